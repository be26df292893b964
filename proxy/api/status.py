"""Endpoints for operators: health, readiness, metrics, and the OpenAPI document with its page."""

from __future__ import annotations

from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Final

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from proxy.api.service import Service
from proxy.errors import NotFound
from proxy.telemetry.metrics import CONTENT_TYPE

DOCS_FOLDER: Final = Path(str(files("fastapi_offline"))) / "static"
DOCS_ASSETS: Final = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")


class StatusEndpoints:
    """The endpoints `/health`, `/ready`, `/metrics`, `/openapi.json` and `/docs`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _: Request) -> Response:
        """Report that the process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Report whether the upstream serves a model. Authenticated callers also get details.

        The upstream is checked at most once a second, however often this is called.
        """
        service = self._service
        is_up = await service.health_monitor.is_ready() and service.engine.is_available
        status: dict[str, object] = {"ready": is_up}
        if service.authenticator.is_authenticated(request):
            sandbox = {"level": service.controllers.sandboxes.level, "lacking": service.controllers.sandboxes.lacking}
            status |= {"upstream": service.engine.display_url, "circuit_breaker": service.engine.circuit_breaker}
            status |= {"models": service.served, "sandbox": sandbox}
            if states := service.engine.replica_states():
                status["replicas"] = [state._asdict() for state in states]
            status["recorder"] = service.episode_log.writer.as_json()
            await service.controllers.refresh()
            assignments = service.controllers.stages.current
            status["controllers"] = {model: assignments.of(model).as_json() for model in service.served}
        return JSONResponse(status, HTTPStatus.OK if is_up else HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics(self, _: Request) -> Response:
        """Return the metrics in the Prometheus text format."""
        await self._service.controllers.refresh()
        return Response(await self._service.worker_metrics.exposition(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """Return the OpenAPI document, which FastAPI generates from the routes and their models."""
        return JSONResponse(request.app.openapi())

    async def docs(self, _: Request) -> Response:
        """Return a page that shows the OpenAPI document. It loads nothing from other hosts."""
        script, style, icon = (f"docs/{name}" for name in DOCS_ASSETS)
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="AutoTTS Proxy",
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=icon,
        )

    async def docs_asset(self, request: Request) -> Response:
        """Return a script, style or icon of the `/docs` page. Raises NotFound."""
        name = request.path_params["asset"]
        if name not in DOCS_ASSETS:
            raise NotFound(f"there is no file {name!r}", code="not_found")
        return FileResponse(DOCS_FOLDER / name)
