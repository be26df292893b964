"""Read files of questions, one JSON object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from discovery.data.recordings import Split, question_id, question_text
from discovery.errors import BadRecording, unknown_field


class Question(BaseModel):
    """One question. A line may have its text as `question` in place of `messages` that hold a single user message."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    messages: list[dict[str, Any]] = Field(min_length=1, description="a conversation, as in a chat request")
    id: str = Field(
        default_factory=lambda known: _default_name(known.get("messages", ())),
        min_length=1,
        description="its name; default: the beginning of its hash",
    )
    reference: str | None = Field(None, min_length=1, description="the reference answer")
    split: Split | None = Field(None, description="what it may be used for; default: by its hash")

    @model_validator(mode="before")
    @classmethod
    def _with_messages(cls, line: Any) -> Any:
        if not isinstance(line, dict) or "question" not in line:
            return line
        if "messages" in line:
            raise ValueError("it has both question and messages; give one of them")
        text = line["question"]
        if not isinstance(text, str) or not text:
            raise ValueError("question: not a non-empty string")
        rest = {key: value for key, value in line.items() if key != "question"}
        return rest | {"messages": [{"role": "user", "content": text}]}

    @model_validator(mode="after")
    def _check_messages(self) -> Question:
        if any(not isinstance(message.get("role"), str) for message in self.messages):
            raise ValueError("messages: each needs a role")
        if any(not isinstance(content := one.get("content"), str | list) or not content for one in self.messages):
            raise ValueError("messages: each needs a content")
        try:
            json.dumps(self.messages, allow_nan=False)
        except ValueError:
            raise ValueError("messages: NaN and Infinity are not valid JSON numbers") from None
        return self

    @property
    def question(self) -> str:
        """The question's `question_id`."""
        return question_id(question_text(self.messages))


def _default_name(messages: Sequence[Mapping[str, Any]]) -> str:
    return question_id(question_text(messages))[:12]


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file, in order. Raises BadRecording, naming the file, the line and the reason."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise BadRecording(f"{path}: {error.strerror}") from None
    questions: list[Question] = []
    seen: dict[str, int] = {}  # ids and hashes, and the line each stands in
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            question = Question.model_validate_json(text)
            jiter.from_json(text, catch_duplicate_keys=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = "".join(f"{part}: " for part in first["loc"])
            problem = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
                problem = unknown_field(str(first["loc"][0]), Question.model_fields)
            raise BadRecording(f"{path}:{number}: {place}{problem}") from None
        except ValueError as error:
            raise BadRecording(f"{path}:{number}: {error}") from None
        for problem, name in (("the same question", question.question), ("the same id", question.id)):
            if name in seen:
                raise BadRecording(f"{path}:{number}: {problem} as in line {seen[name]}")
        seen |= {question.question: number, question.id: number}
        questions.append(question)
    if not questions:
        raise BadRecording(f"{path}: the file holds no questions")
    return questions
