"""Requests: the list with its filters, one request in full, feedback, and what another controller would have done."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from starlette.responses import Response

from controllers.errors import ControllersError
from discovery.answers import is_redacted
from discovery.audit.explain import display_answer, explain, label_names
from discovery.audit.vote_margin import describe_agreement
from discovery.audit.what_if import what_if
from discovery.errors import DiscoveryError, StoreError, TraceError
from discovery.store import ServedEpisode, StorePlace
from discovery.store.usage.requests import MAX_COUNTED, PageEnd, RequestFilter
from proxy.errors import ApiError, BadRequest, NotFound, RecordsAway
from proxy.ui.api_calls import call_api
from proxy.ui.page import Page, PageContext, UiRoute
from proxy.ui.paging import link, number
from proxy.ui.picture import WIDTH, draw
from proxy.ui.sentences import STOPS, TOKEN_KINDS
from proxy.ui.sources.jobs import replay_slots_of
from proxy.ui.sources.replayable import load_replayable, replayable
from proxy.ui.usage import tenant_names

logger = logging.getLogger(__name__)

PATH: Final = "/ui/requests"
PER_PAGE: Final = 50
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,200}")
_LATEST_TIME: Final = 253_402_300_799.0  # the end of the year 9999


async def list_requests(context: PageContext) -> Response:
    """Show a page of the requests that a filter selects."""
    query, reader = context.query, context.service.usage
    if wanted := query.get("id", "").strip():
        if not _ID.fullmatch(wanted):
            raise NotFound(f"{wanted[:64]!r} is not the id of a request", code="not_found")
        return context.redirect(f"{PATH}/{wanted}")
    if reader is None:
        return context.render("requests.html", is_recorded=False)
    which = _filter(context)
    try:
        page = await reader.requests(which, _after(query), PER_PAGE)
        counted = await reader.count(which)
        choices = await reader.choices(context.viewer.tenant_scope)
    except StoreError as error:
        logger.warning("%s", error)
        raise _store_away() from None
    end = page.end
    filters = {name: value for name, value in query.items() if name != "page"}
    names = tenant_names(context.service, {*choices.tenants, *(each.tenant for each in page.requests)})
    return context.render(
        "requests.html",
        is_recorded=True,
        requests=page.requests,
        counted=f"more than {MAX_COUNTED:,}" if counted > MAX_COUNTED else f"{counted:,}",
        is_plural=counted != 1,
        choices=choices,
        keys=[(tenant or "none", names[tenant]) for tenant in choices.tenants] if context.viewer.is_admin else [],
        names=names,
        stops=STOPS,
        is_filtered=any(filters.values()),
        first=link(PATH, filters) if "page" in query else "",
        next=link(PATH, filters, page=end.encode()) if end is not None else "",
    )


async def show_request(context: PageContext) -> Response:
    """Show one request in full, or why it has no record."""
    service, viewer = context.service, context.viewer
    given = context.request.path_params["id"]
    own = service.recent.resolve(viewer.caller.tenant, given, is_admin=viewer.is_admin)
    passed = service.recent.find(own)
    if passed is not None and viewer.reader.may_see(passed.tenant):
        facts = passed.as_json(service.recent.upstream_id(own))
        return context.render("request_passed.html", id=given, facts=facts)
    episode = await service.episode_log.find(viewer.reader, own)
    try:
        values = await asyncio.to_thread(_details, episode)
    except TraceError as error:
        raise ApiError(f"the record of this request cannot be read: {error}", code="unreadable_record") from None
    recording = await _recording(context, own)
    is_complete = recording is not None and recording.complete
    return await asyncio.to_thread(  # many branches take a quarter of a second
        context.render,
        "request.html",
        id=own,
        key=tenant_names(service, [episode.tenant])[episode.tenant],
        kinds=TOKEN_KINDS,
        picture_width=WIDTH,
        controllers=await asyncio.to_thread(replayable, _registry(context)) if is_complete else {},
        recorded=0 if recording is None else len(recording.branches),
        is_complete=is_complete,
        thanks=context.query.get("thanks", ""),
        **values,
    )


async def give_feedback(context: PageContext) -> Response:
    """Record whether an answer was right, through the public endpoint."""
    request_id, form = context.request.path_params["id"], await context.form()
    if form.get("correct") not in ("true", "false"):
        raise BadRequest("correct: say whether the answer was right", param="correct")
    body = json.dumps({"request_id": request_id, "correct": form["correct"] == "true"}).encode()
    await call_api(context, "POST", "/v1/tts/feedback", body, caller=context.viewer.reader)
    return context.redirect(link(f"{PATH}/{request_id}", {"thanks": form["correct"]}))


async def show_what_if(context: PageContext) -> Response:
    """Show what a controller at a β would have answered, from the recorded branches of a request."""
    service, query = context.service, context.query
    request_id = context.request.path_params["id"]
    name = query.get("controller", "")
    beta = number(query, "beta", 0, 1, default=0.5)
    try:
        spec = await asyncio.to_thread(load_replayable, _registry(context), name)
    except DiscoveryError as error:
        raise BadRequest(f"controller: {error}", param="controller") from None
    if spec is None:
        raise BadRequest(f"controller: {name[:50]!r} is neither built in nor installed", param="controller")
    episode = await service.episode_log.find(context.viewer.reader, request_id)
    recording = await _recording(context, request_id)
    if recording is None or not recording.complete:
        raise NotFound("the branches of this request were not recorded to their ends", code="not_found")
    async with replay_slots_of(context).what_if:
        try:
            result = await asyncio.to_thread(what_if, episode, recording, spec, beta)
        except (DiscoveryError, ControllersError) as error:
            raise ApiError(f"it cannot be replayed: {error}", code="unreadable_record") from None
    spent = episode.about.get("spent", sum(episode.ledger.values()))
    answer = None if episode.answer is None else display_answer(episode.answer)
    return context.render("request_what_if.html", result=result, beta=beta, name=spec.name, spent=spent, answer=answer)


def _filter(context: PageContext) -> RequestFilter:
    """Return the filter of the URL, within what the viewer may see. Raises BadRequest."""
    query, own = context.query, context.viewer.tenant_scope
    since, until = (number(query, name, 0, _LATEST_TIME) for name in ("since", "until"))
    low, high = (number(query, name, 0, 2**53) for name in ("tokens_min", "tokens_max"))
    fallback = query.get("fallback", "")
    key = query.get("key")
    return RequestFilter(
        since=None if since is None else datetime.fromtimestamp(since, UTC),
        until=None if until is None else datetime.fromtimestamp(until, UTC),
        tenant=own if own is not None else {None: None, "": None, "none": ""}.get(key, key),
        model=query.get("model") or None,
        controller=query.get("controller") or None,
        stop=query.get("stop") or None,
        beta_min=number(query, "beta_min", 0, 1),
        beta_max=number(query, "beta_max", 0, 1),
        tokens_min=None if low is None else int(low),
        tokens_max=None if high is None else int(high),
        is_fallback=None if fallback not in ("yes", "no") else fallback == "yes",
    )


def _after(query: Mapping[str, str]) -> PageEnd | None:
    """Return where the page begins that the URL names. Raises BadRequest."""
    if not query.get("page"):
        return None
    try:
        return PageEnd.decode(query["page"])
    except ValueError as error:
        raise BadRequest(str(error), param="page") from None


def _registry(context: PageContext) -> StorePlace | None:
    """Return the place of the registry, whose controllers only admins see."""
    return context.service.settings.registry_place if context.viewer.is_admin else None


def _details(episode: ServedEpisode) -> dict[str, Any]:
    """Return the explanation and the picture of an episode. It takes milliseconds, so it runs in a thread."""
    explanation = explain(episode)
    return {
        "episode": episode,
        "explanation": explanation,
        "is_hashed": any(is_redacted(answer) for answer in episode.about.get("answers") or ()),
        "picture": draw(episode, label_names(explanation["answers"])),
        "created": datetime.fromisoformat(episode.created),
        "seconds": episode.about.get("seconds"),
        "confidence": describe_agreement(explanation["agreement"], explanation["confidence"]),
        "estimate": _estimate(explanation),
    }


def _estimate(explanation: Mapping[str, Any]) -> Any:
    """Return the estimated cost of self-consistency with 64 chains, or None."""
    return next((each for each in explanation["estimates"] or () if each["chains"] == 64), None)


async def _recording(context: PageContext, request_id: str) -> Any:
    """Return the recording of a request's branches, or None. Raises RecordsAway."""
    store = context.service.episode_log.writer.store
    try:
        return None if store is None else await store.recording_of(request_id)
    except StoreError as error:
        logger.warning("%s", error)
        raise _store_away() from None


def _store_away() -> RecordsAway:
    return RecordsAway("the store cannot be read now; retry later", code="store_away")


PAGE: Final = Page(
    "requests",
    "Requests",
    (
        UiRoute(PATH, list_requests),
        UiRoute(f"{PATH}/{{id}}", show_request),
        UiRoute(f"{PATH}/{{id}}/what-if", show_what_if),
        UiRoute(f"{PATH}/{{id}}/feedback", give_feedback, method="POST"),
    ),
    href=PATH,
)
