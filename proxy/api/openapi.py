"""The OpenAPI document of what the proxy answers. Requests are described by the models that check them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from proxy.passthrough.forward import GET_PATHS, POST_PATHS
from proxy.requests import beta as dial
from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.feedback_request import FeedbackRequest
from proxy.requests.responses_request import ResponsesRequest

_ANY: Final[Mapping[str, Any]] = {"type": "object"}
_NULLABLE: Final[Mapping[str, Any]] = {"type": ["string", "null"]}

ERROR: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _NULLABLE},
        }
    },
}
"""OpenAI's form of an error. `code` is a text, null, or a number of the upstream's."""


class Operation(NamedTuple):
    """One method of one path."""

    path: str
    summary: str
    body: type[BaseModel] | None = None  # of the request; none for those without
    answer: Mapping[str, Any] = _ANY  # schema of a JSON response
    statuses: tuple[HTTPStatus, ...] = (HTTPStatus.OK,)  # that it is a response of
    takes: str | None = None  # a parameter
    media: str = "application/json"
    streams: bool = False  # server-sent events, if they are asked for
    is_untouched: bool = False  # the upstream describes it
    is_read: bool = False  # the same without a body


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object."""
    return {"type": "object", "required": list(required), "properties": properties}


_TEXT: Final = {"type": "string"}
_READY: Final = (HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE)

OPERATIONS: Final = (
    Operation(
        "/v1/chat/completions",
        "A chat completion, by a controller where β is set and it can be",
        ChatRequest,
        _object("id", "choices", id=_TEXT, choices={"type": "array"}, usage=_ANY, tts=_ANY),
        streams=True,
    ),
    Operation("/v1/completions", "A text gone on with, the same way", CompletionRequest, streams=True),
    Operation("/v1/responses", "A Response, the same way", ResponsesRequest, streams=True),
    Operation("/v1/models", "The models there are", None, _object("data", data={"type": "array"})),
    Operation("/v1/models/{model}", "One model", None, _object("id", id=_TEXT), takes="path"),
    Operation(
        "/v1/tts/curve", "What β costs and brings on a model", None, _object("model", model=_TEXT), takes="query"
    ),
    Operation(
        "/v1/tts/feedback",
        "What a client says of an answer",
        FeedbackRequest,
        _object("id", "status", id=_TEXT, status={"enum": ["recorded", "queued"]}, request_id=_TEXT),
        (HTTPStatus.OK, HTTPStatus.ACCEPTED),
    ),
    Operation("/v1/tts/requests/{request_id}", "Why a request ended as it did", takes="path"),
    Operation("/v1/tts/keys", "What each key may use, and uses now; for admins"),
    Operation("/openapi.json", "This document"),
    Operation("/health", "The process is alive", None, _object("status", status={"const": "ok"})),
    Operation("/ready", "Requests can be served", None, _object("ready", ready={"type": "boolean"}), _READY),
    Operation("/metrics", "Prometheus' page", media="text/plain"),
    *(Operation(path, "Handed to the upstream untouched", is_untouched=True) for path in POST_PATHS),
    *(Operation(path, "Read from the upstream untouched", is_read=True) for path in GET_PATHS),
)


@cache
def document() -> dict[str, Any]:
    """The document. Equal for all deployments; which paths need a key depends on the settings."""
    made: list[tuple[type[BaseModel], Literal["validation"]]]
    made = [(one.body, "validation") for one in OPERATIONS if one.body is not None]
    _, schemas = models_json_schema(made, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        has_body = operation.body is not None or operation.is_untouched
        paths[operation.path] = {"post" if has_body else "get": _described(operation)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "AutoTTS Proxy", "version": _version()},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _version() -> str:
    try:
        return version("autotts-proxy")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"


def _described(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {operation.media: {"schema": operation.answer} if operation.media != "text/plain" else {}}
    if operation.streams:
        content["text/event-stream"] = {}
    is_upstreams = operation.is_untouched or operation.is_read
    answer = {"description": operation.summary, "content": {"*/*": {}} if is_upstreams else content}
    failure = {"description": "What went wrong", "content": {"application/json": {"schema": _ref("Error")}}}
    responses = {str(status.value): answer for status in operation.statuses}
    told: dict[str, Any] = {"summary": operation.summary, "responses": {**responses, "default": failure}}
    if is_upstreams:
        told["responses"]["default"] = {"description": "What went wrong, there or here"}
    if operation.is_untouched:
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ANY}}}
    if operation.body is not None:
        schema = _ref(operation.body.__name__)
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    parameters = []
    if operation.takes == "path":
        name = operation.path.rpartition("{")[2].rstrip("}")
        parameters.append({"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}})
    if operation.takes == "query":
        for name in ("model", "controller"):
            parameters.append({"name": name, "in": "query", "required": False, "schema": {"type": "string"}})
    if operation.streams:
        beta = {"type": "string", "pattern": r"^(0?\.[0-9]{1,9}|[01])$"}
        parameters.append({"name": dial.HEADER, "in": "header", "required": False, "schema": beta})
    if parameters:
        told["parameters"] = parameters
    return told


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
