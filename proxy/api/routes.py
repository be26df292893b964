"""The table of routes: path, method, endpoint, and who may call it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from proxy.admission.auth import Access
from proxy.api.forwarding import ForwardEndpoints
from proxy.api.generation import GenerationEndpoints
from proxy.api.models import ModelEndpoints
from proxy.api.service import Service
from proxy.api.status import StatusEndpoints
from proxy.api.tts import TtsEndpoints
from proxy.passthrough.forward import GET_PATHS, POST_PATHS

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
    endpoint: Callable[[Endpoints], Endpoint]
    access: Access


ROUTES: Final = (
    Route("/v1/chat/completions", "POST", lambda endpoints: endpoints.generate.chat_completions, Access.CLIENT),
    Route("/v1/completions", "POST", lambda endpoints: endpoints.generate.completions, Access.CLIENT),
    Route("/v1/responses", "POST", lambda endpoints: endpoints.generate.responses, Access.CLIENT),
    Route("/v1/models", "GET", lambda endpoints: endpoints.models.list_models, Access.CLIENT),
    Route("/v1/models/{model:path}", "GET", lambda endpoints: endpoints.models.retrieve_model, Access.CLIENT),
    Route("/v1/tts/curve", "GET", lambda endpoints: endpoints.tts.curve, Access.CLIENT),
    Route("/v1/tts/feedback", "POST", lambda endpoints: endpoints.tts.feedback, Access.CLIENT),
    Route("/v1/tts/keys", "GET", lambda endpoints: endpoints.tts.keys, Access.ADMIN),
    Route("/v1/tts/requests/{request_id:path}", "GET", lambda endpoints: endpoints.tts.explain, Access.CLIENT),
    Route("/openapi.json", "GET", lambda endpoints: endpoints.status.openapi, Access.CLIENT),
    Route("/health", "GET", lambda endpoints: endpoints.status.health, Access.ANYONE),
    Route("/ready", "GET", lambda endpoints: endpoints.status.ready, Access.ANYONE),
    Route("/metrics", "GET", lambda endpoints: endpoints.status.metrics, Access.CLIENT),
    *(Route(path, "POST", lambda endpoints: endpoints.forward.post, Access.CLIENT) for path in POST_PATHS),
    *(Route(path, "GET", lambda endpoints: endpoints.forward.get, Access.CLIENT) for path in GET_PATHS),
)
"""Every route. A test holds the app to it, and tries each with no key, a client's key and an admin's."""
