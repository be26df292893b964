"""Describe the routes for FastAPI, which generates the OpenAPI document from them and the request models.

Requests to fixed paths are dispatched before FastAPI (see `proxy/app.py`). So the signatures built here only document
requests and never parse one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final, NamedTuple

from fastapi import Body, Header, Path, Query, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, WithJsonSchema
from starlette.requests import Request

from proxy.requests import beta

Schema = Mapping[str, Any]

ARRAY: Final[Schema] = {"type": "array"}
OBJECT: Final[Schema] = {"type": "object"}
TEXT: Final[Schema] = {"type": "string"}
_SHARE: Final[Schema] = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
TTS: Final[Schema] = {
    "type": "object",
    "required": ["applied"],
    "properties": {
        "applied": {"type": "boolean"},
        "agreement": {**_SHARE, "description": "share of the votes for the answer; null if nothing could vote"},
        "confidence": {**_SHARE, "description": "posterior probability that the answer leads"},
        "flagged": {"type": "boolean", "description": "whether the agreement is below min_agreement"},
        "escalated_beta": {"type": "number", "description": "β at which the episode continued, if it did"},
        "selected_by": {
            "enum": ["vote", "judge", "overlap", None],
            "description": "what decided among whole replies; null if there was only one",
        },
        "judge": {
            "type": "string",
            "description": "outcome of asking the model to compare the replies, if it was asked",
        },
        "compared": {"type": "integer", "minimum": 0, "description": "number of replies that the model compared"},
        "code": {
            "type": "object",
            "description": "with tts.answer code: how many inputs, stated outputs, and replies that could be run",
        },
    },
}
"""The members of the `tts` object in responses that clients decide by. It has others too."""
_NULLABLE: Final[Schema] = {"type": ["string", "null"]}
ERROR: Final[Schema] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": TEXT, "type": TEXT, "param": _NULLABLE},
        }
    },
}
"""OpenAI's error format. `code` is a string, null, or a number from the upstream, so it has no type here."""
BETA_PATTERN: Final = r"^(0?\.[0-9]{1,9}|[01])$"
"""Documented pattern of β in a header."""


_OPTIONAL_TEXT: Final[Any] = Annotated[str | None, WithJsonSchema({"type": "string"})]


class Operation(NamedTuple):
    """Description of one method of one path."""

    summary: str
    body: type[BaseModel] | None = None  # model of the request's JSON
    response: Schema = OBJECT  # of a JSON response
    statuses: tuple[HTTPStatus, ...] = (HTTPStatus.OK,)  # that responses of this schema have
    path: str | None = None  # name of the parameter in the path
    query: tuple[str, ...] = ()  # names of optional parameters
    media: str = "application/json"
    streams: bool = False  # it can answer with server-sent events
    is_forwarded: bool = False  # the upstream defines body and response

    def signature(self, method: str, *, needs_key: bool) -> inspect.Signature:
        """Return the signature by which FastAPI describes the parameters, the body and the API key."""
        parameters = [_parameter("request", Request)]
        if self.path is not None:
            parameters.append(_parameter(self.path, Annotated[str, Path(json_schema_extra={"minLength": 1})]))
        parameters += [_parameter(name, Annotated[_OPTIONAL_TEXT, Query()], None) for name in self.query]
        if self.streams:
            header = Header(alias=beta.HEADER, json_schema_extra={"pattern": BETA_PATTERN})
            parameters.append(_parameter("beta", Annotated[_OPTIONAL_TEXT, header], None))
        if self.body is not None:
            parameters.append(_parameter("body", Annotated[self.body, Body()]))
        elif self.is_forwarded and method == "POST":
            parameters.append(_parameter("body", Annotated[dict[str, Any], Body()]))
        if needs_key:
            parameters.append(_parameter("key", Annotated[Any, Security(HTTPBearer(auto_error=False))], None))
        return inspect.Signature(parameters)

    @property
    def responses(self) -> dict[int | str, dict[str, Any]]:
        """Responses by status, and the error response for any other status."""
        content: dict[str, Any] = {self.media: {"schema": self.response} if self.media == "application/json" else {}}
        if self.streams:
            content["text/event-stream"] = {}
        if self.is_forwarded:
            content = {"*/*": {}}
        failure: dict[str, Any] = {"description": "Error, of the proxy or of the upstream"}
        if not self.is_forwarded:
            failure = {"description": "Error", "content": {"application/json": {"schema": ERROR}}}
        success = {"description": self.summary, "content": content}
        return {**{status.value: success for status in self.statuses}, "default": failure}


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def object_schema(*required: str, **properties: Schema) -> Schema:
    """Return the schema of an object."""
    return {"type": "object", "required": list(required), "properties": properties}


def package_version() -> str:
    """Return the version of the installed package; "0" for a checkout that is not installed."""
    try:
        return version("autotts-proxy")
    except PackageNotFoundError:
        return "0"
