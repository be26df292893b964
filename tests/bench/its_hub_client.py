"""Ask problems by its_hub's adaptive self-consistency. It runs in an environment that has its_hub, not this project.

    python its_hub_client.py URL MODEL BUDGET < problems.json > answers.json

Problems are a JSON list of texts. Answers are a list of [text of the chosen reply, seconds].
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import sys
import time
from typing import Any

CONCURRENCY = 8
"""Problems that are asked at the same time, as in `tests/bench/rivals.py`."""


def boxed(text: str) -> str:
    """Return the answer of a reply, by which its_hub compares them."""
    answers = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return answers[-1] if answers else text


async def main(url: str, model: str, budget: int) -> None:
    """Ask all problems and print the answers."""
    its_hub = importlib.import_module("its_hub")
    client: Any = importlib.import_module("its_hub.core.lms.openai_lm").OpenAICompatibleLanguageModel
    language_model = client(endpoint=f"{url}/v1", api_key="unused", model_name=model)
    algorithm = its_hub.AdaptiveSelfConsistency(consistency_space_projection_func=boxed)
    slots = asyncio.Semaphore(CONCURRENCY)

    async def ask(problem: str) -> tuple[str, float]:
        async with slots:
            began = time.perf_counter()
            reply = await algorithm.ainfer(language_model, problem, budget)
            return str(reply["content"]), time.perf_counter() - began

    answers = await asyncio.gather(*map(ask, json.load(sys.stdin)))
    await language_model.close()
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
