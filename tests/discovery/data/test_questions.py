"""Files of questions: a malformed file is refused with the line and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from discovery.data.questions import Question, read_questions
from discovery.data.recordings import Split, question_id, question_text
from discovery.errors import BadRecording

ASKED = {"role": "user", "content": "What is 6 * 7?"}
TALK = [{"role": "system", "content": "Be brief."}, ASKED]


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "q.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_question_gets_the_same_id_as_in_the_proxy(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"question": "What is 6 * 7?"},
        "",
        {"id": "two", "messages": TALK, "reference": "42", "split": "held-out"},
    )
    first, second = read_questions(path)
    assert (first.messages, first.reference, first.split) == ([ASKED], None, None)
    assert first.question == question_id("What is 6 * 7?")
    assert first.question.startswith(first.id)
    assert (second.id, second.reference, second.split) == ("two", "42", Split.HELD_OUT)
    assert second.question == question_id(question_text(TALK)) != first.question
    assert Question(messages=[ASKED]) == first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ({}, "question or messages is needed; the line has no fields"),
        ({"qestion": "p", "id": "1"}, "question or messages is needed; the line has qestion, id"),
        ({"question": 7}, "question: not a non-empty string"),
        ({"question": ""}, "question: not a non-empty string"),
        ({"question": "p", "messages": TALK}, "it has both question and messages"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"content": "p"}]}, "messages: each needs a role"),
        ({"messages": [{"role": "user"}]}, "messages: each needs a content"),
        ({"messages": [ASKED, {"role": "user", "content": 7}]}, "messages: each needs a content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages: each needs a content"),
        (
            '{"messages": [{"role": "user", "content": "p", "w": NaN}]}',
            "messages: NaN and Infinity are not valid",
        ),
        (
            '{"messages": [{"role": "user", "content": "p", "w": [-Infinity]}]}',
            "messages: NaN and Infinity are not valid",
        ),
        (
            '{"messages": [{"role": "user", "content": "p", "w": 1e999}]}',
            "messages: NaN and Infinity are not valid",
        ),
        ('{"question": "p", "question": "q"}', 'duplicate key "question"'),
        ('{"messages": [{"role": "user", "content": "p", "content": "q"}]}', 'duplicate key "content"'),
        ({"messages": ["p"]}, "messages: 0: Input should be an object"),
        ({"question": "p", "reference": 7}, "reference: Input should be a valid string"),
        ({"question": "p", "reference": ""}, "reference: String should have at least 1 character"),
        (
            {"question": "p", "refrence": "7"},
            "refrence: there is no such field; did you mean reference? known",
        ),
        ({"question": "p", "split": "test"}, "split: Input should be 'search', 'validation' or 'held-out'"),
        ('{"question": "\\ud800"}', "Invalid JSON"),  # a lone surrogate cannot be encoded or hashed
        ({"id": "other", "messages": [{"role": "user", "content": "q"}]}, "the same question as in line 1"),
        ({"id": "one", "question": "p"}, "the same id as in line 1"),
    ],
)
def test_a_malformed_line_of_questions_is_refused_with_its_number_and_reason(
    tmp_path: Path, line: Any, message: str
) -> None:
    path = write(tmp_path, {"id": "one", "question": "q"}, line)
    with pytest.raises(BadRecording) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q"}, {"question": "p"})
    known = read_questions(path)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_questions(path) == known


def test_an_empty_or_missing_file_of_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecording, match=r"q\.jsonl: the file holds no questions"):
        read_questions(write(tmp_path, "", ""))
    with pytest.raises(BadRecording, match=r"none\.jsonl: No such file"):
        read_questions(tmp_path / "none.jsonl")
