"""Every command and snippet of README and the manual runs, or the table of commands says why it does not."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
import tomllib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

import aiohttp
import pytest
import pytest_asyncio
from typer.testing import CliRunner

from deploy.embedded.task import held_back
from proxy.cli import app
from proxy.settings import Settings, parse_upstreams
from tests.docs.blocks import Block, agent_library, fenced_blocks, shell_commands
from tests.docs.command_table import CHANGED, ELSEWHERE, NOT_RUN, PROGRAMS, STATUSES
from tests.docs.workshop import Workshop, environment, workshop

ROOT: Final = Path(__file__).parents[2]
GENERATED: Final = ROOT / "docs" / "report.md"
"""The report. `make report` has run each of its commands."""
PAGES: Final = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {GENERATED})]
BLOCKS: Final = [block for page in PAGES for block in fenced_blocks(page, ROOT)]
SHELL: Final = ("sh", "bash")
LANGUAGES: Final = {*SHELL, "python", "json", "toml", "text", "ts"}  # tests/proxy/api/test_node_client.py has ts
COMMANDS: Final = {block.place: list(shell_commands(block.code)) for block in BLOCKS if block.language in SHELL}
CONTROLLERS: Final = [block for block in BLOCKS if block.language == "python" and "def decide(" in block.code]
SNIPPETS: Final = [
    block
    for block in BLOCKS
    if block.language == "python"
    and block not in CONTROLLERS
    and not agent_library(block)  # test_agent_snippets.py
    and "anthropic" not in block.code  # test_anthropic.py
]
MADE: Final[Mapping[str, tuple[str, ...]]] = {
    "docs/quickstart.md": ("mine.jsonl",),
    "docs/collecting.md": ("mine.jsonl",),
}
"""Files of the workshop that the commands of a page create themselves."""
IMPORTING: Final = (
    "docs/discovery.md",
    "docs/promotion.md",
    "docs/calibration.md",
    "docs/recording.md",
    "docs/statistics.md",
)
"""Pages whose commands need the recordings that a command of another page imports."""
SHELL_PAGES: Final = sorted({block.page for block in BLOCKS if block.language in SHELL})

loops = pytest.mark.asyncio(loop_scope="session")
one_worker = pytest.mark.xdist_group("manual")  # so that a parallel run prepares one workshop only


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Workshop]:
    """One prepared folder and one running proxy for all pages."""
    (controller,) = [block for block in CONTROLLERS if block.page == "docs/evaluation.md"]
    async with workshop(tmp_path_factory.mktemp("workshop") / "prepared", controller.code) as prepared:
        yield prepared


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_code_block_names_a_known_language(block: Block) -> None:
    assert block.language in LANGUAGES


def program(command: str) -> str:
    """Return the program that a command runs, after the variables it sets."""
    return next(part for part in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", part))


@pytest.mark.parametrize("place", COMMANDS)
def test_every_command_is_run_or_listed_as_not_run(place: str) -> None:
    for command in COMMANDS[place]:
        assert command in NOT_RUN or program(command) in {*PROGRAMS, *ELSEWHERE}, command


def test_every_table_entry_matches_a_command_of_the_manual() -> None:
    commands = [command for block in COMMANDS.values() for command in block]
    assert set(NOT_RUN) - set(commands) == set()
    run = [command for command in commands if command not in NOT_RUN]
    assert [part for part in CHANGED if not any(part in command for command in run)] == []
    assert [start for start in STATUSES if not any(command.startswith(start) for command in run)] == []


def test_the_test_files_named_by_the_tables_exist() -> None:
    reasons = [*NOT_RUN.values(), *ELSEWHERE.values()]
    named = [path for reason in reasons for path in re.findall(r"tests/[\w/]+(?:\.py)?", reason)]
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@loops
@one_worker
@pytest.mark.process
@pytest.mark.parametrize("page", SHELL_PAGES)
async def test_the_commands_of_a_page_run_with_their_expected_status(shop: Workshop, page: str, tmp_path: Path) -> None:
    folder = shop.copy(tmp_path / "page", MADE.get(page, ()))
    commands = ["autotts import jsonl mine.jsonl"] if page in IMPORTING else []
    commands += [command for block in BLOCKS if block.page == page for command in COMMANDS.get(block.place, ())]
    is_run = [command for command in commands if command not in NOT_RUN and program(command) not in ELSEWHERE]
    script = _script(shop, is_run)
    status, output = await _run(["bash", "-c", script], folder)
    assert status == 0, output
    assert "Traceback" not in output


@loops
@one_worker
@pytest.mark.process
async def test_the_python_snippets_run_and_print_an_answer(shop: Workshop, tmp_path: Path) -> None:
    paths = []
    for number, block in enumerate(SNIPPETS):
        path = tmp_path / f"{number}-{Path(block.page).stem}-{block.line}.py"
        path.write_text(shop.substituted(block.code))
        paths.append(str(path))
    runner = "import runpy, sys\nfor path in sys.argv[1:]:\n    print('+', path, flush=True)\n    runpy.run_path(path)"
    status, output = await _run([sys.executable, "-c", runner, *paths], shop.folder)
    assert status == 0, output
    assert output.count("\\boxed{7}") >= len(SNIPPETS) - 2, output


@loops
@one_worker
@pytest.mark.process
async def test_a_reply_has_the_headers_and_fields_that_the_api_page_shows(shop: Workshop) -> None:
    headers = next(block for block in BLOCKS if block.page == "docs/api.md" and block.language == "text").code
    example = next(block for block in BLOCKS if block.page == "docs/api.md" and block.language == "json").code
    body = {"messages": [{"role": "user", "content": "What is 2 + 5?"}]}
    async with (
        aiohttp.ClientSession(headers={"x-tts-beta": "0.5"}) as http,
        http.post(f"{shop.url}/v1/chat/completions", json=body) as response,
    ):
        shown = {line.partition(":")[0] for line in headers.splitlines()}
        assert shown == {name.lower() for name in response.headers if name.lower().startswith("x-")}
        tts = (await response.json())["tts"]
    expected = json.loads(example)
    assert list(tts) == list(expected)
    assert [list(tts[name]) for name in ("tokens", "upstream")] == [
        list(expected[name]) for name in ("tokens", "upstream")
    ]


def test_the_questions_of_the_quickstart_are_ones_that_the_embedded_model_knows() -> None:
    (block,) = (block for block in BLOCKS if block.page == "docs/quickstart.md" and block.language == "text")
    lines = [json.loads(line) for line in block.code.splitlines()]
    assert len(lines) == 5
    answers = {problem.question: problem.answer for problem in held_back(40, seed=7, lengths=(5, 8))}
    assert {line["question"]: line["reference"] for line in lines}.items() <= answers.items()


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "json"], ids=lambda b: b.place)
def test_json_blocks_are_valid_json(block: Block) -> None:
    assert json.loads(block.code)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=lambda b: b.place)
def test_toml_blocks_are_valid_settings_or_key_or_model_files(block: Block, tmp_path: Path) -> None:
    content = tomllib.loads(block.code)
    assert content
    file = tmp_path / "file.toml"
    file.write_text(block.code)
    if content.keys() <= Settings.model_fields.keys():
        return
    if "://" in block.code:
        assert parse_upstreams(str(file)).is_map
    else:
        shown = CliRunner().invoke(app, ["keys", "list", str(file)])
        assert shown.exit_code == 0, shown.output
        assert all(name in shown.output for name in content)


def _script(shop: Workshop, commands: list[str]) -> str:
    """Return a script that prints and runs each command and stops at the first with an unexpected status."""
    lines = ["set -uo pipefail", 'curl() { command curl --fail-with-body --silent --show-error "$@"; }']
    for command in commands:
        changed = command
        for part, instead in CHANGED.items():
            changed = changed.replace(part, instead)
        statuses = next((allowed for start, allowed in STATUSES.items() if command.startswith(start)), (0,))
        pattern = "|".join(map(str, statuses))
        lines += [
            f"printf '%s\\n' {shlex.quote(f'+ {changed}')}",
            shop.substituted(changed),
            f'status=$?; case $status in {pattern}) ;; *) echo "status $status"; exit 1 ;; esac',
        ]
    return "\n".join(lines)


async def _run(command: list[str], folder: Path) -> tuple[int | None, str]:
    """Return the status of a command and all it wrote."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
        env=environment(folder),
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()
