"""Read files of questions, one JSON object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from discovery.answers import AUTO
from discovery.answers.structured import class_of_calls, class_of_document
from discovery.data.recordings import Split, question_id, question_text
from discovery.errors import BadRecording, CollectError, first_problem


class Question(BaseModel):
    """One question. A line may have its text as `question` in place of `messages` that hold a single user message."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    messages: list[dict[str, Any]] = Field(min_length=1, description="a conversation, as in a chat request")
    tools: list[dict[str, Any]] | None = Field(None, min_length=1, description="tools, as in a chat request")
    tool_choice: str | dict[str, Any] | None = Field(None, description="as in a chat request; for questions with tools")
    response_format: dict[str, Any] | None = Field(
        None, description="JSON that the reply must be, as in a chat request"
    )
    id: str = Field(
        default_factory=lambda known: _default_name(known),
        min_length=1,
        description="its name; default: the beginning of its hash",
    )
    reference: str | None = Field(
        None, min_length=1, description="the reference answer; of tools a JSON list of calls, of JSON a document"
    )
    split: Split | None = Field(None, description="what it may be used for; default: by its hash")

    @model_validator(mode="before")
    @classmethod
    def _with_messages(cls, line: Any) -> Any:
        if not isinstance(line, dict):
            return line
        if "question" not in line and "messages" not in line:
            raise ValueError(f"question or messages is needed; the line has {', '.join(map(str, line)) or 'no fields'}")
        if "question" not in line:
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

    @model_validator(mode="after")
    def _check_reply(self) -> Question:
        if self.tool_choice is not None and self.tools is None:
            raise ValueError("tool_choice: it needs tools")
        for at, tool in enumerate(self.tools or ()):
            if not isinstance(tool.get("function"), dict) or not isinstance(tool["function"].get("name"), str):
                raise ValueError(
                    f'tools.{at}: must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}'
                )
        if self.response_format is not None and self.response_format.get("type") not in ("json_object", "json_schema"):
            raise ValueError('response_format: its type must be "json_schema" or "json_object"')
        try:
            _ = self.recorded_reference
        except ValueError as error:
            raise ValueError(f"reference: {error}") from None
        return self

    @property
    def reply_fields(self) -> Mapping[str, Any]:
        """Fields of a request that say what a reply may be, beside the messages."""
        fields = {"tools": self.tools, "tool_choice": self.tool_choice, "response_format": self.response_format}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def reply_kind(self) -> str:
        """The answer kind of whole replies, `tools` or `json`; empty if the question asks for a text."""
        return "tools" if self.tools else "json" if self.response_format else ""

    @property
    def text(self) -> str:
        """The text of the question, which identifies it."""
        return question_text(self.messages, self.reply_fields)

    @property
    def question(self) -> str:
        """The question's `question_id`."""
        return question_id(self.text)

    @property
    def recorded_reference(self) -> str | None:
        """The reference as recordings hold it: of whole replies, the class of their vote. Raises ValueError."""
        if self.reference is None or not self.reply_kind:
            return self.reference
        if self.tools:
            functions = [tool["function"] for tool in self.tools]
            return class_of_calls(self.reference, {each["name"]: each.get("parameters") for each in functions})
        schema = (self.response_format or {}).get("json_schema")
        return class_of_document(self.reference, schema.get("schema") if isinstance(schema, dict) else None)


def _default_name(known: Mapping[str, Any]) -> str:
    return question_id(question_text(known.get("messages", ()), known))[:12]


def collected_kind(questions: Sequence[Question], answer: str) -> str:
    """Return the answer kind by which questions are collected: `answer`, or that of their whole replies.

    Raises CollectError if the questions are of several kinds, or `answer` is not theirs.
    """
    kinds = {question.reply_kind for question in questions}
    if len(kinds) > 1:
        named = ", ".join(sorted(kind or "text" for kind in kinds))
        raise CollectError(f"the questions ask for replies of several kinds ({named}); collect each into its own file")
    kind = next(iter(kinds), "")
    if kind and answer not in (str(AUTO), kind):
        raise CollectError(f"--answer {answer}: the questions ask for {kind}; leave --answer out")
    return kind or answer


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
            raise BadRecording(f"{path}:{number}: {first_problem(error, Question)}") from None
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
