"""Playground: ask a question and watch the episode. The request goes through the public endpoint."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError
from starlette.responses import Response

from controllers.builtin import ADMIN_ONLY, BUILT_IN
from controllers.loading import discovered
from deploy.embedded import SERVED_MODEL_NAME
from discovery.errors import StoreError
from proxy.errors import BadRequest
from proxy.first_question import first_question
from proxy.ui.api_calls import call_api
from proxy.ui.page import Page, PageContext, UiRoute
from proxy.ui.sentences import TOKEN_KINDS, EndedEpisode, describe_end

ANSWER_KINDS: Final = (
    ("auto", "auto: whatever it is"),
    ("boxed", "boxed: the last \\boxed{}"),
    ("number", "number"),
    ("choice", "choice: a letter from A to J"),
    ("text:words", "text:words: text compared by its words"),
    ("code:lines", "code:lines: code compared by its lines"),
    ("select", "select: the model chooses a reply"),
    ("synthesise", "synthesise: the model writes one from several"),
)
RECENT_DAYS: Final = 7
"""Days of requests from which the cost of β is estimated where there is no calibration."""
_COMPLETIONS: Final = "/v1/chat/completions"


async def show(context: PageContext) -> Response:
    """Show the form."""
    service = context.service
    await service.health_monitor.is_ready()  # it updates the list of models, at most once a second
    models = [(model, await _costs(context, model)) for model in service.served]
    names = sorted({*BUILT_IN, *discovered()} - ADMIN_ONLY)
    settings: dict[str, Any] = {
        "kinds": dict(TOKEN_KINDS),
        "needsKey": service.authenticator.keyring is not None,
        "costs": dict(models),
        "isRecorded": service.episode_log.writer.is_on,
    }
    return context.render(
        "playground.html",
        models=[model for model, _ in models],
        champions={model: service.controllers.champion(model).name for model in service.served},
        controllers=names,
        kinds=ANSWER_KINDS,
        example=first_question(is_embedded=SERVED_MODEL_NAME in service.served).question,
        settings=settings,
    )


async def ask(context: PageContext) -> Response:
    """Pass the page's request on to the public endpoint, and stream what a client would get."""
    return await call_api(context, "POST", _COMPLETIONS)


async def explain_end(context: PageContext) -> Response:
    """Return the sentences on an episode that ended, from what the page knows of it. Nothing has to be stored."""
    form = await context.form()
    try:
        episode = EndedEpisode.model_validate_json(form.get("episode", ""))
    except ValidationError:
        raise BadRequest("episode: send the fields of an ended episode as JSON", param="episode") from None
    most = context.service.request_slots.branch_cap(context.viewer.caller)
    return context.json({"why": describe_end(episode, most)})


async def _costs(context: PageContext, model: str) -> dict[str, Any] | None:
    """Return mean tokens by β of each controller of a model, from the calibration, else from recent requests."""
    service = context.service
    first = service.betas.calibrations.get(model)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    if first is not None:
        source = "calibration"
        for each in first.all:
            points[each.controller] = [(point.beta, point.tokens) for point in each.points]
    elif service.usage is not None:
        source = f"mean of requests of the last {RECENT_DAYS} days"
        since = datetime.now(UTC) - timedelta(days=RECENT_DAYS)
        try:
            costs = await service.usage.costs(model, since, context.viewer.tenant_scope)
        except StoreError:
            costs = []
        for cost in costs:
            points[cost.controller].append((cost.beta, cost.tokens))
    if not points:
        return None
    return {"source": source, "default": service.controllers.champion(model).name, "points": dict(points)}


PAGE: Final = Page(
    "playground",
    "Playground",
    (
        UiRoute("/ui/playground", show),
        UiRoute("/ui/data/playground", ask, method="POST"),
        UiRoute("/ui/data/playground/end", explain_end, method="POST"),
    ),
    href="/ui/playground",
)
