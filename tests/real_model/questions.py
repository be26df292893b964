"""Questions of `reasoning-gym` whose replies are JSON documents with one field, `answer`, for `autotts collect`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

SEED: Final = 7
FORMAT: Final[Mapping[str, Any]] = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"answer": {"type": "integer"}},
            "required": ["answer"],
            "additionalProperties": False,
        },
    },
}
TASKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "max_value": 60},
    "leg_counting": {"max_animals": 4},
}
"""Datasets whose answers are whole numbers, and their settings. Of these, the verifier accepts the reference only."""


def structured_questions(count: int) -> Iterator[dict[str, Any]]:
    """Yield lines of `count` different questions of each task. Their references pass the verifier of their dataset."""
    import reasoning_gym

    for task, settings in TASKS.items():
        made = reasoning_gym.create_dataset(task, size=4 * count, seed=SEED, **settings)
        entries = {entry["question"]: entry for entry in made if made.score_answer(entry["answer"], entry) == 1}
        for question, entry in list(entries.items())[:count]:
            document = {"answer": int(entry["answer"])}
            yield {"question": question, "response_format": FORMAT, "reference": json.dumps(document)}


def write_questions(file: Path, count: int) -> None:
    """Write the lines of `structured_questions` to a file."""
    lines = [json.dumps(line) + "\n" for line in structured_questions(count)]
    file.write_text("".join(lines))
