"""The manual's snippets with clients of agents run unmodified, apart from the proxy's address and the model."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.bench.peers import AGENT_CLIENTS
from tests.docs.blocks import Block, agent_library, fenced_blocks
from tests.fakes import MODEL
from tests.proxy.api.test_agent_clients import agent_proxy

ROOT: Final = Path(__file__).parents[2]
SNIPPETS: Final = [block for block in fenced_blocks(ROOT / "docs" / "clients.md", ROOT) if agent_library(block)]
PRINTED: Final = {
    "pydantic_ai": ["It is \\boxed{7} degrees.", "name='Rome' people=2"],
    "agents": ["It is \\boxed{7} degrees."],
    "instructor": ["name='Rome' people=2"],
    "pydantic": ['{"city": "Rome"}', "name='Rome' people=2"],  # with the OpenAI SDK
}
"""The lines that a snippet prints, by the library that it uses."""


def test_each_library_has_one_snippet() -> None:
    assert sorted(map(agent_library, SNIPPETS)) == sorted(PRINTED)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("block", SNIPPETS, ids=agent_library)
async def test_the_snippet_runs_and_prints_the_voted_replies(block: Block, tmp_path: Path) -> None:
    library = agent_library(block)
    python = Path(sys.executable) if library in ("pydantic_ai", "pydantic") else AGENT_CLIENTS.python
    if not python.exists():
        pytest.skip(f"{library} is not here; `make test` installs it")
    async with agent_proxy() as url:
        code = block.code.replace("http://127.0.0.1:8400/v1", url).replace("autotts-tiny", MODEL)
        process = await asyncio.create_subprocess_exec(
            str(python),
            *("-c", code),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**AGENT_CLIENTS.environment(), "HOME": str(tmp_path)},
        )
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert output.decode().splitlines() == PRINTED[library]
