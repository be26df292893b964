"""Problems for the real model: their worked examples end in the answer that the generator gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from discovery.data.questions import read_questions
from tests.real_model.asking import Reply
from tests.real_model.discovery import Problem
from tests.real_model.extraction import HEADINGS, WORKED, AskedRow, draw_items, fields_right, prompts
from tests.real_model.questions import SEED, TASKS, write_questions


@pytest.mark.parametrize(
    ("expression", "answer", "steps"),
    [
        ("98 - 93 + 77 + 13", "95", "98 - 93 = 5. 5 + 77 = 82. 82 + 13 = 95."),
        ("6 + 0 - 12", "-6", "6 + 0 = 6. 6 - 12 = -6."),
    ],
)
def test_a_worked_example_shows_every_step_and_the_answer(expression: str, answer: str, steps: str) -> None:
    assert Problem("", expression, answer).worked == f"{steps} The answer is \\boxed{{{answer}}}."


@pytest.mark.slow  # importing reasoning-gym takes seconds
def test_questions_with_json_replies_have_references_that_pass_their_verifier(tmp_path: Path) -> None:
    gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed; the extra real-model has it")
    write_questions(tmp_path / "questions.jsonl", 5)
    asked = read_questions(tmp_path / "questions.jsonl")
    assert len(asked) == 5 * len(TASKS)
    assert {question.reply_kind for question in asked} == {"json"}
    for at, (task, settings) in enumerate(TASKS.items()):
        made = gym.create_dataset(task, size=20, seed=SEED, **settings)
        entries = {entry["question"]: entry for entry in made}
        for question in asked[5 * at : 5 * at + 5]:
            entry, answer = entries[question.messages[0]["content"]], json.loads(question.reference or "")["answer"]
            assert made.score_answer(str(answer), entry) == 1
            assert made.score_answer(str(answer + 1), entry) < 1


def test_every_sentence_states_all_that_must_be_read_from_it() -> None:
    items = draw_items(40)
    assert draw_items(40) == items
    for item in items:
        assert all(str(value) in item.sentence for value in item.person.values())
    first, *_ = asked = prompts(items)
    assert len(asked) == 40 - WORKED
    assert [turn["role"] for turn in first] == [*("user", "assistant") * WORKED, "user"]
    assert first[-1]["content"] == items[WORKED].sentence


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({}, [True] * 4), ({"age": 1}, [True, False, True, True]), ({"city": None}, [True, True, False, True])],
    ids=str,
)
def test_each_field_of_a_reply_is_compared(changed: dict[str, object], expected: list[bool]) -> None:
    person = draw_items(1)[0].person
    assert fields_right(json.dumps(person | changed), person) == expected


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"name": '])
def test_a_reply_that_is_no_object_has_no_right_field(text: str) -> None:
    assert fields_right(text, draw_items(1)[0].person) == [False] * 4


def test_a_row_has_the_mean_of_each_figure_with_its_interval() -> None:
    agreements = [1.0, 1.0, 0.5, None]
    greedy = AskedRow("JSON", "greedy", np.zeros(4), [25.0] * 4, [Reply("", 30, 30, 1, "")] * 4)
    replies = [Reply("", 90, 100 + 10 * number, 3, "safe", part) for number, part in enumerate(agreements)]
    row = AskedRow("JSON", "β = 0.5", np.ones(4), [75.0] * 4, replies)
    assert dict(zip(HEADINGS, greedy.cells(greedy), strict=True))["agreement %"] == ""
    cells = dict(zip(HEADINGS, row.cells(greedy), strict=True))
    assert cells["right %, 95 %"].startswith("100.0 (")
    assert cells["over greedy"] == "+100.0 (+100.0 to +100.0)"
    assert cells["fields right %"] == "75.0 (75.0 to 75.0)"
    assert cells["agreement %"].startswith("83 (")
    assert cells["tokens"].startswith("115.0 (1")
    assert cells["branches"] == "3.0"
