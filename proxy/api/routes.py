"""Table of routes: path, method, required access, endpoint and its description in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from proxy.admission.auth import Access
from proxy.api.forwarding import ForwardEndpoints
from proxy.api.generation import GenerationEndpoints
from proxy.api.models import ModelEndpoints
from proxy.api.openapi import ARRAY, OBJECT, TEXT, TTS, Operation, object_schema
from proxy.api.service import Service
from proxy.api.status import StatusEndpoints
from proxy.api.tts import TtsEndpoints
from proxy.passthrough.forward import GET_PATHS, POST_PATHS
from proxy.requests.anthropic_request import MessagesRequest
from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.feedback_request import FeedbackRequest
from proxy.requests.responses_request import ResponsesRequest

Endpoint = Callable[[Request], Awaitable[Response]]


class Endpoints:
    """All endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self.forward = ForwardEndpoints(service)
        self.generate = GenerationEndpoints(service, self.forward)
        self.models = ModelEndpoints(service)
        self.tts = TtsEndpoints(service)
        self.status = StatusEndpoints(service)


class Route(NamedTuple):
    """A path and method, the endpoint that answers it, and who may call it."""

    path: str
    method: str
    access: Access
    endpoint: Callable[[Endpoints], Endpoint]
    operation: Operation | None  # description; None if the OpenAPI document omits the route


ROUTES: Final = (
    Route(
        "/v1/chat/completions",
        "POST",
        Access.CLIENT,
        lambda endpoints: endpoints.generate.chat_completions,
        Operation(
            "Create a chat completion, with a controller where β is set",
            ChatRequest,
            object_schema("id", "choices", id=TEXT, choices=ARRAY, usage=OBJECT, tts=TTS),
            streams=True,
        ),
    ),
    Route(
        "/v1/completions",
        "POST",
        Access.CLIENT,
        lambda endpoints: endpoints.generate.completions,
        Operation(
            "Create a text completion, with a controller where β is set",
            CompletionRequest,
            object_schema(tts=TTS),
            streams=True,
        ),
    ),
    Route(
        "/v1/responses",
        "POST",
        Access.CLIENT,
        lambda endpoints: endpoints.generate.responses,
        Operation(
            "Create a Response, with a controller where β is set",
            ResponsesRequest,
            object_schema(tts=TTS),
            streams=True,
        ),
    ),
    Route(
        "/v1/messages",
        "POST",
        Access.CLIENT,
        lambda endpoints: endpoints.generate.messages,
        Operation("Create a message of Anthropic's API, without a controller", MessagesRequest, streams=True),
    ),
    Route(
        "/v1/models",
        "GET",
        Access.CLIENT,
        lambda endpoints: endpoints.models.list_models,
        Operation("List the models and their aliases", response=object_schema("data", data=ARRAY)),
    ),
    Route(
        "/v1/models/{model:path}",
        "GET",
        Access.CLIENT,
        lambda endpoints: endpoints.models.retrieve_model,
        Operation("Retrieve a model or an alias", response=object_schema("id", id=TEXT), path="model"),
    ),
    Route(
        "/v1/tts/curve",
        "GET",
        Access.CLIENT,
        lambda endpoints: endpoints.tts.curve,
        Operation(
            "Retrieve the cost and accuracy of each β on a model",
            response=object_schema("model", model=TEXT),
            query=("model", "controller"),
        ),
    ),
    Route(
        "/v1/tts/feedback",
        "POST",
        Access.CLIENT,
        lambda endpoints: endpoints.tts.feedback,
        Operation(
            "Record feedback on an answer",
            FeedbackRequest,
            object_schema("id", "status", id=TEXT, status={"enum": ["recorded", "queued"]}, request_id=TEXT),
            (HTTPStatus.OK, HTTPStatus.ACCEPTED),
        ),
    ),
    Route(
        "/v1/tts/keys",
        "GET",
        Access.ADMIN,
        lambda endpoints: endpoints.tts.keys,
        Operation("Retrieve the limits, the β and the usage of each key (admins only)"),
    ),
    Route(
        "/v1/tts/requests/{request_id:path}",
        "GET",
        Access.CLIENT,
        lambda endpoints: endpoints.tts.explain,
        Operation("Explain why a request ended as it did", path="request_id"),
    ),
    Route(
        "/openapi.json",
        "GET",
        Access.ANYONE,
        lambda endpoints: endpoints.status.openapi,
        Operation("Retrieve this document"),
    ),
    Route("/docs", "GET", Access.ANYONE, lambda endpoints: endpoints.status.docs, None),
    Route("/docs/{asset}", "GET", Access.ANYONE, lambda endpoints: endpoints.status.docs_asset, None),
    Route(
        "/health",
        "GET",
        Access.ANYONE,
        lambda endpoints: endpoints.status.health,
        Operation("Check that the process is alive", response=object_schema("status", status={"const": "ok"})),
    ),
    Route(
        "/ready",
        "GET",
        Access.ANYONE,
        lambda endpoints: endpoints.status.ready,
        Operation(
            "Check that requests can be served",
            response=object_schema("ready", ready={"type": "boolean"}),
            statuses=(HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE),
        ),
    ),
    Route(
        "/metrics",
        "GET",
        Access.CLIENT,
        lambda endpoints: endpoints.status.metrics,
        Operation("Retrieve the metrics in the Prometheus text format", media="text/plain"),
    ),
    *(
        Route(
            path,
            "POST",
            Access.CLIENT,
            lambda endpoints: endpoints.forward.post,
            Operation("Forward the request to the upstream", is_forwarded=True),
        )
        for path in POST_PATHS
    ),
    *(
        Route(
            path,
            "GET",
            Access.CLIENT,
            lambda endpoints: endpoints.forward.get,
            Operation("Read from the upstream", is_forwarded=True),
        )
        for path in GET_PATHS
    ),
)
"""All routes. A test compares the app with this table, and calls each route without, with a client and an admin key."""
