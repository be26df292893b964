"""Parse request bodies into models. Each error names the first invalid field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeVar

from pydantic import AliasChoices, BaseModel, ValidationError

from discovery.data.safe_json import compact_json
from discovery.errors import unknown_field
from proxy.errors import BadRequest, clipped
from proxy.requests import field_values, strict_json
from proxy.requests.feedback_request import FeedbackRequest
from proxy.requests.generation_request import CodeOptions, ToolOptions, TtsOptions

M = TypeVar("M", bound=BaseModel)

_MAX_SHOWN: Final = 80
"""Maximum number of characters of a key that an error message quotes."""
_TTS_OBJECTS: Final[Mapping[str, type[BaseModel]]] = MappingProxyType({"tools": ToolOptions, "code": CodeOptions})
"""Objects within `tts`."""
_MISPLACED: Final = ("beta", "target_tokens", "max_total_tokens", "deadline_s", "min_agreement")
"""Options of `tts` that are refused beside it. No API has fields of these names, and unknown fields are dropped."""
_PREFIXED: Final = re.compile(r"(?:x[-_])?tts[-_.](?=.)", re.IGNORECASE)
"""Beginning of fields such as `tts_beta` and `x-tts-beta`, which mean options of `tts`."""

_OF_CLIENTS: Final = ("extra_body", "extra_headers")
"""Arguments of OpenAI's SDK that requests without the SDK contain by mistake."""


def parse_request(model: type[M], raw: bytes) -> M:
    """Return the request in a JSON body. Raises BadRequest."""
    body = strict_json.read_object(raw)
    request = _validate(model, body)
    for name in body:
        option = _misplaced_option(name)
        if option is not None:
            example = clipped(compact_json({option: body[name]}), _MAX_SHOWN)
            shown = clipped(name, _MAX_SHOWN)
            message = f'{shown}: there is no such field; send it in the object tts, as in "tts": {example}'
            raise BadRequest(message, param=shown, code="unknown_field")
    for name in _OF_CLIENTS:
        if name in body:
            message = (
                f"{name}: this is an argument of the OpenAI SDK, no field; send what is in it with the request itself"
            )
            raise BadRequest(message, param=name, code="unknown_field")
    field_values.check(body)
    return request


def _misplaced_option(name: str) -> str | None:
    """Return the option of `tts` that the name of a field beside it means, or None."""
    if name in _MISPLACED:
        return name
    match = _PREFIXED.match(name)
    return None if match is None else name[match.end() :]


def parse_feedback_request(raw: bytes) -> FeedbackRequest:
    """Return the feedback in a JSON body. Raises BadRequest."""
    return _validate(FeedbackRequest, strict_json.read_object(raw))


def _validate(model: type[M], body: dict[str, Any]) -> M:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(clipped(str(part), _MAX_SHOWN) for part in first["loc"] if part != "[key]")
        problem = first["msg"].removeprefix("Value error, ")
        if first["loc"][:1] == ("tts",) and problem.startswith("Input should be"):
            path, problem = _option_problem(path, problem, first["input"])
        message, param = f"{path}: {problem}" if path else problem, path or None
        if first["type"] == "extra_forbidden":
            message = f"{path}: {_unknown_field_message(model, first['loc'])}"
            raise BadRequest(message, param=param, code="unknown_field") from None
        if path == "tts.beta":
            raise BadRequest(message, param=param, code="bad_beta") from None
        raise BadRequest(message, param=param) from None


def _option_problem(path: str, problem: str, value: object) -> tuple[str, str]:
    """Return the path of an option in `tts`, and what is wrong with its `value`, which is quoted if it is short."""
    if path.startswith("tts.progress"):  # pydantic names the first type of the union
        path, problem = "tts.progress", 'Input should be true, false or "rounds"'
    if path == "tts.beta":
        problem = "Input should be a number from 0 to 1 such as 0.5"
    if not isinstance(value, str | int | float | None):
        return path, problem
    shown = value[:_MAX_SHOWN] if isinstance(value, str) else value
    return path, f"{problem}, not {clipped(json.dumps(shown, ensure_ascii=False), _MAX_SHOWN)}"


def _unknown_field_message(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    """Return a message about the unknown field at `loc`: the nearest known field, and all of them."""
    owner = TtsOptions if loc[0] == "tts" and len(loc) > 1 else model
    if loc[0] == "tts" and len(loc) > 2:
        owner = _TTS_OBJECTS.get(str(loc[1]), owner)
    names: list[str] = []
    for name, field in owner.model_fields.items():
        alias = field.validation_alias
        names += map(str, alias.choices) if isinstance(alias, AliasChoices) else [name]
    return unknown_field(str(loc[-1]), names)
