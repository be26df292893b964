"""Overview: what requests cost, how they ended, and the state of the proxy."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from starlette.responses import Response

from controllers.rollout_state import RolloutStage
from discovery.errors import StoreError
from discovery.store.usage.facts import FAILED_STOPS, KINDS
from discovery.store.usage.periods import (
    BetaBin,
    LatencyBin,
    Period,
    UsagePoint,
    UsageTotal,
    beta_bins,
    latency_bins,
    latency_quantile,
)
from discovery.store.usage.reader import UsageReader
from discovery.store.usage.sums import Measure
from proxy.api.service import Service
from proxy.ui.charts import Axis, Chart, ChartKind, Scale, Series
from proxy.ui.page import Page, PageContext, UiRoute
from proxy.ui.paging import choice
from proxy.ui.sentences import STOPS, TOKEN_KINDS
from proxy.ui.usage import RANGES, period_of, scope_of, tenant_names

logger = logging.getLogger(__name__)

HOME: Final = "/ui"
PANELS: Final = "/ui/overview/panels"
MOST_TENANTS: Final = 20
"""Keys with the most tokens that are listed."""
_NOTHING: Final = "No request in this period. Ask something in the playground, or send a request with x-tts-beta."


class KeyUsage(NamedTuple):
    """Usage of one key: of its requests in the period, and of its budget now."""

    name: str
    requests: int
    tokens: int
    running: int | None
    waiting: int | None
    spent: int | None  # tokens of this minute
    limit: int | None  # tokens per minute


async def show(context: PageContext) -> Response:
    """Show the page. Its panels are requested again every few seconds."""
    return context.render("overview.html", **await _values(context))


async def panels(context: PageContext) -> Response:
    """Return the panels only."""
    return context.render("overview_panels.html", **await _values(context))


async def _values(context: PageContext) -> dict[str, Any]:
    service, reader = context.service, context.service.usage
    name = choice(context.query, "range", RANGES, "day")
    usage: dict[str, Any] = {"problem": "", "is_recorded": reader is not None}
    if reader is not None:
        try:
            usage |= await _usage(context, reader, period_of(name))
        except StoreError as error:
            logger.warning("%s", error)
            usage["problem"] = str(error) if context.viewer.is_admin else "retry later"
    return {
        "range": name,
        "ranges": [(key, title) for key, (title, _, _) in RANGES.items()],
        "is_up": await service.health_monitor.is_ready() and service.engine.is_available,
        "upstream": service.engine.display_url,
        "replicas": service.engine.replica_states(),
        "circuit_breaker": service.engine.circuit_breaker,
        "sandboxes": service.controllers.sandboxes,
        "recorder": service.episode_log.writer.as_json(),
        "stages": _stages(service),
        "saved": _estimated_saving(service) if context.viewer.is_admin else None,
        **usage,
    }


async def _usage(context: PageContext, reader: UsageReader, period: Period) -> dict[str, Any]:
    """Return the charts and figures of a period. Raises StoreError."""
    scope = scope_of(context)
    kinds = await reader.series(Measure.KIND, period, scope)
    stops = await reader.series(Measure.STOP, period, scope)
    others = _others(kinds, stops)
    betas = beta_bins(await reader.totals(Measure.BETA, period, scope))
    latencies = latency_bins(await reader.totals(Measure.LATENCY, period, scope))
    ends = _totals(stops)
    requests = sum(end.requests for end in ends)
    tokens = sum(end.tokens for end in ends)
    return {
        "requests": requests,
        "tokens": tokens,
        "mean_tokens": tokens / requests if requests else None,
        "failed": sum(end.requests for end in ends if end.name in FAILED_STOPS),
        "late": sum(end.requests for end in ends if end.name == "deadline"),  # with or without a reply
        "p50": latency_quantile(latencies, 0.5),
        "p95": latency_quantile(latencies, 0.95),
        "ends": sorted(ends, key=lambda end: -end.requests),
        "reasons": STOPS,
        "spent": sorted(_totals([*kinds, *others]), key=lambda total: -total.tokens),
        "meanings": TOKEN_KINDS,
        "charts": [
            _by_time("tokens", "Tokens by kind", "tokens", period, kinds + others, KINDS, ChartKind.AREA),
            _by_time("stops", "Requests by stop reason", "requests", period, stops, tuple(STOPS), ChartKind.BAR),
            _betas(betas),
            _latencies(latencies),
        ],
        "keys": await _keys(context, await reader.by_tenant(period, scope)),
    }


def _others(kinds: Iterable[UsagePoint], ends: Iterable[UsagePoint]) -> list[UsagePoint]:
    """Return the tokens of each bucket that no known kind accounts for."""
    left: dict[Any, int] = defaultdict(int)
    for end in ends:
        left[end.start] += end.tokens
    for kind in kinds:
        left[kind.start] -= kind.tokens
    return [UsagePoint(start, "other", 0, tokens, 0.0) for start, tokens in left.items() if tokens]


def _by_time(
    name: str,
    title: str,
    unit: str,
    period: Period,
    points: Sequence[UsagePoint],
    order: Sequence[str],
    kind: ChartKind,
) -> Chart:
    """Return a chart of sums over time. Buckets without requests are zero."""
    starts = period.buckets()
    values: dict[str, dict[Any, int]] = defaultdict(dict)
    for point in points:
        values[point.name][point.start] = point.tokens if unit == "tokens" else point.requests
    names = sorted(values, key=lambda each: (order.index(each) if each in order else len(order), each))
    series = [Series(each, [(start.timestamp(), values[each].get(start, 0)) for start in starts]) for each in names]
    x, y = Axis("Time", scale=Scale.TIME), Axis(unit.capitalize(), f"per {period.bucket}", minimum=0, is_count=True)
    return Chart(name, title, kind, x, y, series, empty=_NOTHING)


def _betas(bins: Sequence[BetaBin]) -> Chart:
    points = [(f"{each.beta:g}", float(each.requests)) for each in bins]
    series = [Series("requests", points)] if any(each.requests for each in bins) else []
    x, y = Axis("β", scale=Scale.CATEGORY), Axis("Requests", minimum=0, is_count=True)
    return Chart("betas", "β in use", ChartKind.BAR, x, y, series, empty=_NOTHING)


def _latencies(bins: Sequence[LatencyBin]) -> Chart:
    points = [(_span(each), float(each.requests)) for each in bins]
    series = [Series("requests", points)] if points else []
    x, y = Axis("Time from request to reply", scale=Scale.CATEGORY), Axis("Requests", minimum=0, is_count=True)
    return Chart("latencies", "Latency", ChartKind.BAR, x, y, series, empty=_NOTHING)


def _span(each: LatencyBin) -> str:
    """Return the upper end of a bin, since neighbours meet there."""
    longest = each.longest_s
    return f"≤ {1000 * longest:.0f} ms" if longest < 1 else f"≤ {longest:.3g} s"


def _totals(points: Iterable[UsagePoint]) -> list[UsageTotal]:
    """Return the sums over time by name."""
    totals: dict[str, UsageTotal] = {}
    for point in points:
        known = totals.get(point.name, UsageTotal(point.name, 0, 0, 0.0))
        totals[point.name] = known._replace(
            requests=known.requests + point.requests,
            tokens=known.tokens + point.tokens,
            seconds=known.seconds + point.seconds,
        )
    return list(totals.values())


async def _keys(context: PageContext, used: Sequence[UsageTotal]) -> list[KeyUsage]:
    """Return the keys that used the most tokens, and every configured key that the viewer may see."""
    service, viewer = context.service, context.viewer
    ring = service.authenticator.keyring
    configured = [] if ring is None else [key for key in ring.keys if viewer.reader.may_see(key.tenant)]
    budgets = (await service.request_slots.as_json({key.name: key.caps for key in configured}))["keys"]
    totals = {total.name: total for total in used[:MOST_TENANTS]}
    rows = []
    for tenant, name in tenant_names(service, [*totals, *(key.tenant for key in configured)]).items():
        total = totals.get(tenant, UsageTotal(tenant, 0, 0, 0.0))
        budget = budgets.get(name, {})
        limits = budget.get("limits", {})
        rows.append(
            KeyUsage(
                name,
                total.requests,
                total.tokens,
                budget.get("episodes"),
                budget.get("waiting"),
                budget.get("spent"),
                limits.get("tokens_per_minute"),
            )
        )
    return rows


def _stages(service: Service) -> list[dict[str, Any]]:
    """Return the controllers at each stage of each served model."""
    rows = []
    for model in service.served:
        assigned = service.controllers.stages.current.of(model)
        for stage in reversed(RolloutStage):
            spec = assigned.at(stage)
            if spec is not None:
                share = assigned.share if stage is RolloutStage.CANARY else None
                rows.append({"model": model, "stage": str(stage), "controller": spec.name, "share": share})
    return rows


def _estimated_saving(service: Service) -> dict[str, float]:
    """Return the estimated tokens that self-consistency would have cost beyond all requests since the start."""
    saved, overspent = (
        sum(sample.value for family in counter.collect() for sample in family.samples if sample.name.endswith("_total"))
        for counter in (service.metrics.tokens_saved, service.metrics.tokens_overspent)
    )
    return {"tokens": saved - overspent, "branches": service.settings.max_branches}


async def without_slash(context: PageContext) -> Response:
    """Redirect `/ui/` to the overview."""
    return context.redirect(HOME)


PAGE: Final = Page(
    "overview",
    "Overview",
    (UiRoute(HOME, show), UiRoute(f"{HOME}/", without_slash), UiRoute(PANELS, panels)),
    href=HOME,
)
