"""Request body of POST /v1/tts/feedback."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, model_validator

from discovery.answers import canonical
from discovery.answers.redaction import MARK


def _comparable(answer: str) -> str:
    """Return `answer` unchanged. Raises ValueError if it cannot be compared with other answers."""
    if canonical(answer) is None:
        raise ValueError("no answer can be read from it; send the bare answer, such as 42")
    if answer.lstrip().startswith(MARK):
        raise ValueError(f"it begins with {MARK!r}, which marks redacted answers; send the answer itself")
    return answer


class FeedbackRequest(BaseModel):
    """Feedback on an answer: exactly one of `correct`, `answer` and `score`. `id` is an alias of `request_id`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request: Annotated[str, Field(min_length=1, max_length=200, validation_alias=AliasChoices("request_id", "id"))]
    correct: Annotated[bool, Field(strict=True)] | None = None
    answer: Annotated[str, Field(min_length=1, max_length=10_000), AfterValidator(_comparable)] | None = None
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_equal_ids(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get("id", ...) == fields.get("request_id"):
            return {name: value for name, value in fields.items() if name != "id"}
        return fields

    @model_validator(mode="after")
    def _check_exactly_one(self) -> FeedbackRequest:
        sent = [name for name in ("correct", "answer", "score") if getattr(self, name) is not None]
        if len(sent) != 1:
            got = " and ".join(sent) or "none of them"
            raise ValueError(f"send exactly one of correct, answer and score; got {got}")
        return self
