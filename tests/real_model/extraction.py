"""Ask the real model for JSON under a schema, and for results of `reasoning-gym`, at several β.

    python -m tests.real_model --extraction 60 [--betas 0,0.3,0.6,1]

Each item of the extraction is a sentence about a made-up person after three worked ones. The reply must be JSON under a
strict schema, so whole replies are the branches and each field is voted on. The results are chains of additions and
subtractions, and are voted on as text.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.real_model.asking import EXAMPLES, Message, RealModel, Reply
from tests.real_model.discovery import MAX_TOKENS, conversations, draw_problems
from tests.real_model.study import GREEDY, SAMPLE, accuracy_cell, gain_cell, mean_cell

WORKED: Final = 3
LIMIT: Final = 80
"""Most tokens of a reply; a right one has about 40."""
CONTROLLER: Final = "adaptive_consistency"
FIELDS: Final = ("name", "age", "city", "job")
FORMAT: Final[dict[str, Any]] = {
    "type": "json_schema",
    "json_schema": {
        "name": "person",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 30},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "city": {"type": "string", "maxLength": 20},
                "job": {"type": "string", "maxLength": 20},
            },
            "required": list(FIELDS),
            "additionalProperties": False,
        },
    },
}
NAMES: Final = ("Ada", "Bruno", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jana", "Karim", "Lena")
SURNAMES: Final = ("Adler", "Brandt", "Costa", "Duval", "Eriksen", "Fischer", "Gomez", "Horvat", "Ito", "Jansen")
CITIES: Final = ("Oslo", "Porto", "Lyon", "Graz", "Turin", "Ghent", "Split", "Bergen", "Seville", "Leeds")
JOBS: Final = ("baker", "nurse", "pilot", "tailor", "plumber", "lawyer", "teacher", "farmer", "cook", "painter")
TEMPLATES: Final = (
    "{name}, who is {age}, moved from {old_city} to {city} and works there as a {job}.",
    "After {years} years as a {old_job} in {old_city}, {name} is now {age} and a {job} in {city}.",
    "The {job} {name} lives in {city}. She turned {age} last week; her brother in {old_city} is {other_age}.",
)
"""Each has a fact that must not be taken: another city, job or age."""


class Item(NamedTuple):
    """A sentence, and what must be read from it."""

    sentence: str
    person: dict[str, Any]


def draw_items(count: int) -> list[Item]:
    """Return different items, the same ones every time."""
    generator, items = random.Random(7), dict[str, Item]()
    while len(items) < count:
        (city, old_city), (job, old_job) = generator.sample(CITIES, 2), generator.sample(JOBS, 2)
        age, other_age = generator.sample(range(25, 65), 2)
        name = f"{generator.choice(NAMES)} {generator.choice(SURNAMES)}"
        person = {"name": name, "age": age, "city": city, "job": job}
        others = {"old_city": old_city, "old_job": old_job, "other_age": other_age, "years": generator.randint(3, 20)}
        sentence = generator.choice(TEMPLATES).format(**person, **others)
        items[sentence] = Item(sentence, person)
    return list(items.values())


def prompts(items: Sequence[Item]) -> list[list[Message]]:
    """Return the conversation of each item but the first `WORKED`, which come before it with their answers."""
    turns: list[Message] = [
        {"role": role, "content": content}
        for item in items[:WORKED]
        for role, content in (("user", item.sentence), ("assistant", json.dumps(item.person)))
    ]
    return [[*turns, {"role": "user", "content": item.sentence}] for item in items[WORKED:]]


def fields_right(text: str, person: dict[str, Any]) -> list[bool]:
    """Return for each field whether a reply has the right value; none has if the reply is not a JSON object."""
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    return [isinstance(said, dict) and said.get(field) == person[field] for field in FIELDS]


class AskedRow(NamedTuple):
    """All questions of a task asked one way."""

    task: str
    name: str
    right: NDArray[np.float64]  # (questions,) 1 where the reply is right
    parts: Sequence[float]  # for each question, the percentage of right fields; empty if replies have no fields
    replies: Sequence[Reply]

    def cells(self, greedy: AskedRow) -> tuple[str, ...]:
        """Return the row as it is printed, compared with `greedy` on the same questions."""
        agreements = [100 * reply.agreement for reply in self.replies if reply.agreement is not None]
        return (
            self.task,
            self.name,
            accuracy_cell(self.right),
            "" if self is greedy else gain_cell(self.right, greedy.right),
            mean_cell(self.parts, 1),
            mean_cell(agreements, 0),
            mean_cell([reply.total for reply in self.replies], 1),
            f"{statistics.fmean(reply.branches for reply in self.replies):.1f}",
        )


HEADINGS: Final = ("task", "", "right %, 95 %", "over greedy", "fields right %", "agreement %", "tokens", "branches")


async def rows(model: RealModel, count: int, betas: Sequence[float]) -> AsyncIterator[AskedRow]:
    """Yield the rows of both tasks: greedy first, then a single sample, then each β."""
    ways: list[tuple[str, float | None, dict[str, Any]]] = [(GREEDY, None, {"temperature": 0}), (SAMPLE, None, {})]
    ways += [(f"β = {beta:g}", beta, {"tts": {"controller": CONTROLLER}}) for beta in betas]
    items = draw_items(WORKED + count)
    for name, beta, fields in ways:
        replies = await model.ask_all(prompts(items), beta, max_tokens=LIMIT, response_format=FORMAT, **fields)
        parts = np.array(
            [fields_right(reply.text, item.person) for reply, item in zip(replies, items[WORKED:], strict=True)]
        )
        yield AskedRow("JSON", name, parts.all(axis=1).astype(float), list(100 * parts.mean(axis=1)), replies)
    asked = list(conversations(draw_problems(EXAMPLES + count)))
    for name, beta, fields in ways:
        replies = await model.ask_all([turns for turns, _ in asked], beta, max_tokens=MAX_TOKENS, **fields)
        right = [float(reply.number == problem.answer) for reply, (_, problem) in zip(replies, asked, strict=True)]
        yield AskedRow("chain_sum", name, np.array(right), [], replies)
