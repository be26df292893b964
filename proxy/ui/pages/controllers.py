"""Controllers: what the registry holds, which controller serves, and changes of stages with their audit trail.

Changes are made by the functions of `autotts promote` and `autotts rollback`, so that the same rules hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

from starlette.responses import Response

from controllers.builtin import ADMIN_ONLY, BUILT_IN
from controllers.rollout_state import RolloutStage, RolloutState
from discovery.commands.promote import known_digests, promote_known
from discovery.errors import PromotionError
from discovery.promotion.registry import ChangeCause, Registry
from discovery.promotion.storage.cards import BUILT_IN_MARK, Card
from proxy.errors import BadRequest, NotFound
from proxy.ui.charts import Axis, Chart, ChartKind, Scale, Series
from proxy.ui.page import Page, PageContext, UiRoute, ViewAccess
from proxy.ui.paging import choice, number
from proxy.ui.sources.highlighted import python_html

T = TypeVar("T")
HOME: Final = "/ui/controllers"
LATEST: Final = 50
"""Changes of the audit trail that the page shows."""
_PROMOTE, _ROLLBACK, _DROP = "promote", "rollback", "drop"
_DAMAGED: Final = "its card is damaged"
_MOST_REASON: Final = 300
_REPORTED: Final = frozenset(
    {"verdict", "headline", "questions", "delta_afs", "interval", "p", "alpha", "mde", "conditions"}
)
"""Fields of a gate's report that the page shows."""


class StageRow(NamedTuple):
    """A stage of a model, and the controller at it."""

    model: str | None  # None: the default of models without their own
    stage: RolloutStage
    digest: str | None  # None: the configured controller
    name: str
    share: float | None  # of a canary
    headline: str
    reason: str = ""  # why it got there, as the audit trail says


class RegistryView(NamedTuple):
    """Contents of the registry."""

    state: RolloutState
    cards: Mapping[str, Card]
    damaged: Mapping[str, str]  # why other cards cannot be used
    audit: list[Mapping[str, Any]]  # the latest first


class ControllerOrigin(NamedTuple):
    """How a discovered controller was found."""

    explorer: str
    note: str  # what it was made of
    questions: int
    cells: str
    candidates: int
    usd: float


class StageChange(NamedTuple):
    """A change of stages that somebody asks for."""

    action: str  # promote, rollback, or drop (the canary)
    what: str  # name of a built-in controller or digest of an installed one; empty for a rollback
    stage: RolloutStage
    share: float
    model: str | None

    def apply(self, registry: Registry, by: ChangeCause) -> None:
        """Change the registry. Raises PromotionError; nothing has changed then."""
        if self.action == _ROLLBACK:
            registry.roll_back(by, self.model)
        elif self.action == _DROP:
            registry.drop_canary(registry.read().own(self.model).canary or "", by, self.model)
        else:
            promote_known(registry, self.what, self.stage, self.share, by, self.model)

    def sentence(self, view: RegistryView) -> str:
        """Return what the change does."""
        where = "all models without a champion of their own" if self.model is None else f"model {self.model}"
        own = view.state.own(self.model)
        if self.action == _DROP:
            if own.canary is None:
                raise BadRequest(f"there is no canary for {where}", param="model")
            return f"{named(view, own.canary)} is no canary any more; the champion of {where} serves its requests, too."
        if self.action == _ROLLBACK:
            if own.champion is None and own.canary is None:
                raise BadRequest(f"there is nothing to roll back for {where}", param="model")
            after = view.state.roll_back(self.model).own(self.model).champion
            default = "the configured controller" if self.model is None else "the default's champion"
            champion = default if after is None else named(view, after)
            return f"{champion} serves {where}, and there is no canary any more."
        name = named(view, self.what)
        if self.stage is RolloutStage.CANARY:
            return f"{name} serves {100 * self.share:g} % of the requests of {where} as the canary."
        if self.stage is RolloutStage.SHADOW:
            return f"{name} decides ended episodes of {where} again, for comparison. It costs no tokens."
        return f"{name} serves the requests of {where} as the champion."


async def show(context: PageContext) -> Response:
    """Show the stages, the installed controllers and the latest changes."""
    registry, configured = _registry_or_none(context), context.service.settings.controller
    if registry is None:
        return context.render("controllers.html", view=None, configured=configured)
    view = await _in_thread(lambda: _read(registry))
    models = sorted({*context.service.served, *view.state.models})
    owners = (None, *sorted(view.state.models))
    return context.render(
        "controllers.html",
        view=view,
        stages=_stages(view, configured),
        models=models,
        built_in=sorted(set(BUILT_IN) - ADMIN_ONLY),
        audit=view.audit[:LATEST],
        with_canary=[model for model in owners if view.state.own(model).canary],
        with_champion=[model for model in owners if view.state.own(model).champion],
    )


async def show_card(context: PageContext) -> Response:
    """Show an installed controller: its card, its curve, its gate report, its source and its changes."""
    registry = _registry(context)
    digest = context.request.path_params["digest"]
    view = await _in_thread(lambda: _read(registry))
    card = view.cards.get(digest)
    if digest in view.damaged:
        raise BadRequest(view.damaged[digest], code="promotion_refused")
    if card is None:
        raise NotFound(f"no controller {digest[:64]!r} is installed; go back to the controllers", code="not_found")
    source = "" if card.get(BUILT_IN_MARK) else (await _in_thread(lambda: registry.spec(digest))).source or ""
    return context.render(
        "controller.html",
        card=card,
        digest=digest,
        stages=list(view.state.stages_of(digest)),
        is_quarantined=digest in view.state.quarantined,
        chart=curve_chart(card),
        report=_report(card),
        origin=_origin(card),
        source=python_html(source),
        audit=[line for line in view.audit if line.get("digest") == digest],
    )


async def confirm(context: PageContext) -> Response:
    """Show what a change does, with a form that makes it."""
    change = _change(context.query)
    registry = _registry(context)
    view = await _in_thread(lambda: _read(registry))
    return context.render(
        "controller_change.html", change=change, sentence=change.sentence(view), version=view.state.version
    )


async def make_change(context: PageContext) -> Response:
    """Make a change that was confirmed, unless the registry has changed since."""
    form = await context.form()
    change, why = _change(form), form.get("why", "").strip()
    if not why or len(why) > _MOST_REASON or not why.isprintable():
        raise BadRequest(f"why: give a reason of at most {_MOST_REASON} characters in one line", param="why")
    registry = _registry(context)
    version = number(form, "version", 0, 2**53)
    if version is None:
        raise BadRequest("version: missing; go back to the controllers and confirm the change again", param="version")
    by = ChangeCause(f"ui: {context.viewer.name}", why, datetime.now(UTC), version=int(version))
    await _in_thread(lambda: change.apply(registry, by))
    return context.redirect(HOME)


def named(view: RegistryView, what: str) -> str:
    """Return the name of a controller, with the beginning of its digest if it is installed."""
    if what in view.damaged:
        return f"{what[:12]} ({_DAMAGED})"
    card = view.cards.get(what)
    return what if card is None else f"{card['name']} ({what[:12]})"


def curve_chart(card: Card) -> Chart:
    """Return accuracy over tokens of a discovered controller, as its search measured it."""
    try:
        series = [
            Series(
                " ".join(map(str, cell["cell"])),
                [(float(point["tokens"]), float(point["accuracy"])) for point in cell["points"]],
                notes=[f"β = {point['beta']:g}" for point in cell["points"]],
            )
            for cell in card["discovery"]["search"]["cells"]
        ]
    except (LookupError, TypeError, ValueError):  # written by hand: the file beside a controller may be anything
        series = []
    return Chart(
        "curve",
        "Accuracy over tokens in its search",
        ChartKind.LINE,
        Axis("mean tokens per question", "tokens", Scale.LOG),
        Axis("accuracy", "%"),
        series,
        "On questions of the search split. The gate judged it on others.",
    )


def _report(card: Card) -> Mapping[str, Any] | None:
    """Return the gate's report of a card, or None if it has none or one that the gate did not write."""
    report = card.get("report")
    return report if isinstance(report, Mapping) and report.keys() >= _REPORTED else None


def _origin(card: Card) -> ControllerOrigin | None:
    """Return how a controller was found, or None. The file beside a controller may have been written by hand."""
    try:
        discovery = card["discovery"]
        data, cost = discovery["data"], discovery["cost"]
        cells = ", ".join(map(str, data["cells"]))
        return ControllerOrigin(
            str(discovery["explorer"]),
            str(discovery["note"] or ""),
            int(data["questions"]),
            cells,
            int(cost["candidates"]),
            float(cost["usd"]),
        )
    except (LookupError, TypeError, ValueError):
        return None


def _read(registry: Registry) -> RegistryView:
    with registry.session() as opened:
        state = opened.read()
        cards = opened.cards(known_digests(state, opened.digests()))
        return RegistryView(state, cards.readable, cards.damaged, opened.audit()[::-1])


def _stages(view: RegistryView, configured: str) -> list[StageRow]:
    """Return the stages of the default and of each model, champions first. The default always has a champion."""
    rows = []
    for model in (None, *sorted(view.state.models)):
        holders = view.state.own(model)
        for stage, digest in reversed(holders.stages.items()):
            if digest is not None:
                card = view.cards.get(digest, {"headline": _DAMAGED})
                share = holders.share if stage is RolloutStage.CANARY else None
                name, headline = card.get("name", digest[:12]), card.get("headline", "")
                rows.append(StageRow(model, stage, digest, name, share, headline, _reason(view, digest, model)))
            elif model is None and stage is RolloutStage.CHAMPION:
                rows.append(StageRow(None, stage, None, configured, None, "set by AUTOTTS_CONTROLLER"))
    return rows


def _reason(view: RegistryView, digest: str, model: str | None) -> str:
    """Return why a controller was last put at a stage of a model, and by whom; empty if the trail does not say."""
    lines = (line for line in view.audit if line.get("digest") == digest and line.get("model") == model)
    latest = next((line for line in lines if line.get("why")), None)
    return "" if latest is None else f"{latest['why']} ({latest['who']})"


def _change(fields: Mapping[str, str]) -> StageChange:
    """Return the change that a form describes. Raises BadRequest."""
    action = choice(fields, "action", (_PROMOTE, _ROLLBACK, _DROP), _PROMOTE)
    what = fields.get("what", "").strip()
    if action == _PROMOTE and not what:
        raise BadRequest("what: name the controller to promote", param="what")
    stage = RolloutStage(choice(fields, "stage", tuple(RolloutStage), RolloutStage.SHADOW))
    percent = number(fields, "percent", 0, 100, default=10)
    return StageChange(action, what, stage, percent / 100, fields.get("model", "").strip() or None)


def _registry_or_none(context: PageContext) -> Registry | None:
    place = context.service.settings.registry_place
    return None if place is None else Registry(place)


def _registry(context: PageContext) -> Registry:
    registry = _registry_or_none(context)
    if registry is None:
        raise BadRequest(
            "this proxy has no registry; start it with AUTOTTS_REGISTRY=FOLDER|URL",
            code="no_registry",
        )
    return registry


async def _in_thread(work: Callable[[], T]) -> T:
    """Return the result of work on the registry. Raises BadRequest with the reason of a refusal."""
    try:
        return await asyncio.to_thread(work)
    except (PromotionError, ValueError) as error:
        raise BadRequest(str(error), code="promotion_refused") from None


PAGE: Final = Page(
    "controllers",
    "Controllers",
    (
        UiRoute(HOME, show, ViewAccess.ADMIN),
        UiRoute(f"{HOME}/card/{{digest}}", show_card, ViewAccess.ADMIN),
        UiRoute(f"{HOME}/change", confirm, ViewAccess.ADMIN),
        UiRoute(f"{HOME}/change", make_change, ViewAccess.ADMIN, "POST"),
    ),
    href=HOME,
    access=ViewAccess.ADMIN,
)
