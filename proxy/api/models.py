"""Endpoints `GET /v1/models` and `GET /v1/models/{model}`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from proxy.api.response_headers import untouched_headers
from proxy.api.service import Service
from proxy.errors import NotFound
from proxy.passthrough.forward import forward
from proxy.requests.beta import alias_card
from proxy.types import ALIAS_BETAS
from proxy.upstream.relayed_body import RelayedBody


class ModelEndpoints:
    """Endpoints under `/v1/models`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list_models(self, request: Request) -> Response:
        """List the upstream's models unchanged, followed by their aliases. Several upstreams are listed as one."""
        engine = self._service.engine
        has_aliases = self._service.settings.model_aliases
        if not has_aliases and not engine.replica_states():
            return await forward(engine, request, RelayedBody(b""), untouched_headers("endpoint"))
        cards = await engine.model_cards()
        aliases = [alias_card(card, beta) for card in cards for beta in ALIAS_BETAS] if has_aliases else []
        return JSONResponse({"object": "list", "data": [*cards, *aliases]}, headers=untouched_headers("endpoint"))

    async def retrieve_model(self, request: Request) -> Response:
        """Return one model, or its alias with any β. Raises NotFound, BadRequest or UpstreamError."""
        name = request.path_params["model"]
        model, beta = await self._service.models.find(name)
        card = next((card for card in await self._service.engine.model_cards() if card["id"] == model.id), None)
        if card is None:
            raise NotFound(
                f"the upstream no longer serves model {name!r}; list its models at /v1/models",
                param="model",
                code="model_not_found",
            )
        shown = card if beta is None else {**alias_card(card, beta), "id": name}
        return JSONResponse(shown, headers=untouched_headers("endpoint"))
