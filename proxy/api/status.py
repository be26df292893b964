"""Endpoints for operators: health, readiness, metrics and the OpenAPI document."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from proxy.api import openapi
from proxy.api.service import Service
from proxy.telemetry.metrics import CONTENT_TYPE


class StatusEndpoints:
    """`/health`, `/ready`, `/metrics` and `/openapi.json`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _: Request) -> Response:
        """Say that the process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Say whether the upstream serves a model. Callers with a key, where there are keys, also learn the details.

        The upstream is asked once a second at most, however often this is called.
        """
        service = self._service
        is_up = await service.health_monitor.is_ready() and service.engine.breaker.is_closed
        status: dict[str, object] = {"ready": is_up}
        if service.authenticator.is_authenticated(request):
            sandbox = {"level": service.controllers.level, "lacking": service.controllers.lacking}
            status |= {"upstream": service.engine.display_url, "models": service.served, "sandbox": sandbox}
            status["recorder"] = service.episode_log.writer.as_json()
        return JSONResponse(status, HTTPStatus.OK if is_up else HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics(self, _: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(self._service.metrics.exposition(), media_type=CONTENT_TYPE)

    async def openapi(self, _: Request) -> Response:
        """Return the OpenAPI document."""
        return JSONResponse(openapi.document())
