"""Find the upstream's models by the name in a request."""

from __future__ import annotations

from proxy.errors import NotFound, UpstreamProtocolError
from proxy.requests.beta import split_alias
from proxy.types import Model
from proxy.upstream.fleet.interface import Upstream


class ModelDirectory:
    """The upstream's models by name, and their aliases that set β (`name@0.5`)."""

    def __init__(self, engine: Upstream, default: str | None) -> None:
        self._engine = engine
        self._default = default  # model of requests that name none; None means the upstream's first model
        self._models: dict[str, Model] = {}

    async def refresh(self) -> dict[str, Model]:
        """Read the upstream's models and return them by name. Raises UpstreamError."""
        self._models = {model.id: model for model in await self._engine.models()}
        return self._models

    async def find(self, name: str | None) -> tuple[Model, float | None]:
        """Return the model called `name`, and the β that its alias sets, or None.

        Raises NotFound, BadRequest or UpstreamError.
        """
        name = name or self._default
        models = self._models or await self.refresh()
        if name is None:
            if not models:
                raise UpstreamProtocolError(f"{self._engine.display_url} serves no model")
            return next(iter(models.values())), None
        if name in models or name in await self.refresh():
            return self._models[name], None
        plain = name.rpartition("@")[0]
        _, beta = split_alias(name) if plain in self._models else (name, None)
        if beta is not None:
            return self._models[plain], beta
        hint = f"; set β by a number, as in {plain}@0.5" if plain in self._models else ""
        message = f"there is no model {name!r}; the upstream serves {', '.join(self._models)}{hint}"
        raise NotFound(message, param="model", code="model_not_found")
