"""The life of one request a controller serves: plan, run, reply."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from textwrap import shorten
from typing import Any, Final, NamedTuple, TypeVar
from uuid import uuid4

from controllers import ControllerError, Limits, State, Stop, UnknownController
from discovery.answers import AUTO, ExtractionMethod
from discovery.data.recordings import DEFAULT_TEMPERATURE, question_text
from proxy import probe_templates
from proxy.admission.token_budget import EpisodeCaps
from proxy.environment import votability
from proxy.environment.answer_reader import GraderPool
from proxy.environment.live_environment import BranchesTruncated, LiveEnvironment, NotVotable, SentBytesExceeded
from proxy.episode.episode_metrics import count_episode
from proxy.episode.reply import compose_reply, deadline_error
from proxy.errors import ApiError, BadRequest, UpstreamError
from proxy.http import graceful_shutdown
from proxy.recording.episode_log import EpisodeLog
from proxy.recording.template_drift import TemplateDrift
from proxy.requests.generation_request import SAMPLING, GenerationRequest
from proxy.rollout.controller_runner import ControllerManager, ControllerRunner
from proxy.settings import Settings
from proxy.telemetry import logs
from proxy.telemetry.metrics import Metrics
from proxy.types import (
    ChosenController,
    EffectiveBeta,
    EnvironmentLimits,
    FinalAnswerLimits,
    Model,
    Plan,
    Prompt,
    Provenance,
    Reply,
)
from proxy.upstream.client import TooManyTokens, UpstreamClient

T = TypeVar("T", int, float)

logger = logging.getLogger(__name__)

TOLD_VOTES, TOLD_CHARS = 5, 40
"""Answers that are named to a client while branches think, and characters of each."""
CONTEXT_EXCEEDED: Final = "context_length_exceeded"
"""The code of a prompt that is too long. Gateways tell it by this, or by how OpenAI's message begins."""
CLOSE_S = 2.0
"""Seconds past its deadline in which a reply may still be composed; then what there is goes out as it is."""
PROMPT_TAIL = 8
"""Ids of a prompt's end that are turned back to text, to see whether its template opened a thought."""


class _Bounds(NamedTuple):
    environment: EnvironmentLimits
    limits: Limits
    final_answer: FinalAnswerLimits


async def plan(
    engine: UpstreamClient,
    controllers: ControllerManager,
    settings: Settings,
    caps: EpisodeCaps,
    model: Model,
    request: GenerationRequest,
    beta: EffectiveBeta,
    *,
    tenant: str = "",
    drift: TemplateDrift | None = None,
    salt: str | None = None,
    request_id: str = "",
) -> Plan:
    """Tokenise the prompt and fix every bound; `drift` knows the chat template, where that is written down.

    `request_id` is the request's name; without one it gets a name. `caps` are the limits of its caller.

    Raises BadRequest or UpstreamError; nothing has been generated.
    """
    started = time.monotonic()
    request_id = request_id or f"chatcmpl-{uuid4().hex}"
    logs.request_id.set(request_id)
    deadline_s = _least(request.tts.deadline_s, settings.deadline_s)
    async with fail_after(deadline_s):
        try:
            spec, stage = await controllers.choose(request.tts.controller, request_id)
        except UnknownController as error:
            raise BadRequest(str(error), param="tts.controller", code="unknown_controller") from None
        chat_template = "" if drift is None else await drift.template(model.id)
        ids, text = await _read_prompt(engine, model, request)
        tail = await engine.detokenise(model.id, ids[-PROMPT_TAIL:])
        template = probe_templates.template_for(
            settings.probe_family, tail, close=settings.probe_close, lead=settings.probe_lead
        )
        bounds = await _bounds(engine, settings, caps, model, request, len(ids), template)
    sampling = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    if request.temperature == 0:  # equal branches would vote in vain: only the first is greedy
        del sampling["temperature"]
        if settings.branch_temperature is not None:
            sampling["temperature"] = settings.branch_temperature
    if request.ignore_eos:
        sampling["ignore_eos"] = True
    return Plan(
        request_id=request_id,
        created=int(time.time()),
        started=started,
        beta=beta,
        spec=spec,
        stage=stage,
        prompt=Prompt(
            model=model.id,
            ids=ids,
            tail=tail,
            sampling=sampling,
            greedy_first=request.temperature == 0,
            stop=request.stop_strings,
            seed=request.seed,
            kind=request.tts.answer,
            template=template,
            salt=salt,
            asks=votability.asks(_asked_last(request.conversation) or text),
        ),
        environment_limits=bounds.environment,
        limits=bounds.limits,
        final_answer_limits=bounds.final_answer,
        deadline_s=deadline_s,
        temperature=sampling.get("temperature"),
        provenance=Provenance(tenant, text, _drawn_by(request, sampling), chat_template),
        streamed=bool(request.stream),
    )


@asynccontextmanager
async def fail_after(seconds: float | None) -> AsyncIterator[None]:
    """What comes before the first branch and may take so many seconds. Raises UpstreamTimeout if it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise deadline_error() from None


async def _read_prompt(engine: UpstreamClient, model: Model, request: GenerationRequest) -> tuple[Sequence[int], str]:
    """Return the prompt's ids, and the text of the question. Raises BadRequest for a prompt that is far too long."""
    most, messages = model.max_length, request.conversation
    try:
        if request.prompt_ids is not None:
            if len(request.prompt_ids) > most:
                raise TooManyTokens
            return request.prompt_ids, await engine.detokenise(model.id, request.prompt_ids)
        if request.prompt_text is not None:
            return await engine.tokenise_prompt(model.id, request.prompt_text, most), request.prompt_text
        body = {"model": model.id, "messages": messages, **request.template_fields}
        return await engine.tokenise_chat(body, most), question_text(messages)
    except TooManyTokens:
        raise BadRequest(
            f"This model's maximum context length is {most} tokens. However, your {request.prompt_field} has "
            "many more. Shorten it",
            param=request.prompt_field,
            code=CONTEXT_EXCEEDED,
        ) from None


def _asked_last(conversation: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation's last message of the user; empty if there is none."""
    content = next((one.get("content") for one in reversed(conversation) if one.get("role") == "user"), None)
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _drawn_by(request: GenerationRequest, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """All by which branches are drawn and read: sampling, limit, how answers are found, and what the chat template was
    told, as a hash; so is a pattern, for it is the client's text."""
    drawn = dict(sampling)
    if request.temperature == 0:
        drawn["branch_temperature"] = sampling.get("temperature", DEFAULT_TEMPERATURE)
        drawn["temperature"] = request.temperature
    if request.tts.answer != AUTO:
        kind = request.tts.answer
        is_pattern = kind.method is ExtractionMethod.REGEX
        drawn["answer"] = f"{kind.method}:{_hashed(kind.argument)}" if is_pattern else str(kind)
    if request.branch_limit is not None:
        drawn["max_tokens"] = request.branch_limit
    if not request.conversation:
        drawn["prompt"] = "raw"
    if fields := request.template_fields:
        drawn["template_fields"] = _hashed(json.dumps(fields, sort_keys=True))
    return drawn


def _hashed(text: str) -> str:
    return blake2b(text.encode(), digest_size=4).hexdigest()


async def _bounds(
    engine: UpstreamClient,
    settings: Settings,
    caps: EpisodeCaps,
    model: Model,
    request: GenerationRequest,
    prompt: int,
    template: probe_templates.Template,
) -> _Bounds:
    """Token bounds under which a branch, its probes and its closing fit the model's context and the request's cap."""
    close = len(await engine.tokenise_suffix(model.id, template.longest_closing))
    suffix = len(await engine.tokenise_suffix(model.id, template.longest_suffix))
    cap = _least(request.tts.max_total_tokens, caps.tokens)
    probe = settings.probe_tokens
    finalise = min(settings.finalise_tokens, (model.max_length - prompt) // 4)
    if cap is not None:
        finalise = max(probe, min(finalise, cap // 4))
    room = model.max_length - prompt - max(close + finalise, suffix + max(probe, finalise))
    if room < 1:
        needed = model.max_length - prompt - room + 1
        raise BadRequest(
            f"This model's maximum context length is {model.max_length} tokens. However, your prompt has "
            f"{prompt} tokens, and with β a reply needs at least {needed} more. Shorten it, or send it without β",
            param=request.prompt_field,
            code=CONTEXT_EXCEEDED,
        )
    branch = min(room, request.branch_limit or room)
    reserve = close + finalise + suffix + probe
    ahead = None
    if cap is not None and not request.tts.answer.is_declared_votable:
        # reserve what the votability check may cost
        reserve += suffix + probe
        ahead = max(0, cap - reserve - min(settings.interval, branch)) // 8
        reserve += ahead
    cut_probes = None
    if cap is not None and request.stop_strings:
        cut_probes = max(0, cap - reserve - min(settings.interval, branch)) // 8 // (suffix + probe)
        reserve += cut_probes * (suffix + probe)
    least = reserve + min(settings.interval, branch)
    if cap is not None and cap < least:
        is_clients = cap == request.tts.max_total_tokens
        source = "tts.max_total_tokens" if is_clients else caps.source or "the server's limit AUTOTTS_MAX_TOTAL_TOKENS"
        way_out = "raise it" if is_clients else "ask for shorter replies, or the operator for more"
        raise BadRequest(
            f"{source} is {cap}; one interval and its answer need {least} here: {way_out}",
            param="tts.max_total_tokens" if is_clients else None,
            code="cap_too_small",
        )
    limits = Limits(
        interval=settings.interval,
        max_branches=caps.branches,
        branch_tokens=branch,
        probe_tokens=suffix + probe,
        max_tokens=None if cap is None else cap - reserve,
    )
    return _Bounds(
        EnvironmentLimits(settings.interval, branch, probe, ahead, settings.max_sent_bytes, cut_probes),
        limits,
        FinalAnswerLimits(finalise, probe),
    )


async def serve(
    engine: UpstreamClient,
    grading: GraderPool,
    controllers: ControllerManager,
    metrics: Metrics,
    episode_log: EpisodeLog,
    plan: Plan,
    tell: Callable[[str], None] | None = None,
    settle: Callable[[int], None] | None = None,
) -> Reply:
    """Run the episode, compose_reply its reply, and have it written down. `tell` hears of each round, a line at a time.

    Raises ApiError when there is nothing to answer with, or the proxy ends before there is. Cancelling aborts all that
    is in flight; what had been spent is counted either way, and `settle` told of it.
    """
    environment = LiveEnvironment(engine, plan.prompt, plan.environment_limits, grading.grader(plan.provenance.tenant))
    if plan.records_all or plan.ignores_eos:  # all branches are wanted, whatever they say
        environment.votable = environment.votable_confirmed = True
        environment.ends_early = False
    state = State(plan.limits)
    runner = controllers.runner(ChosenController(plan.spec, plan.stage))
    if tell is not None:
        runner.on_round = lambda: tell(_progress(environment, state))
    reply: Reply | None = None
    outcome = "failed"
    try:
        with metrics.episodes_in_flight.track_inprogress():
            failure = await _run(runner, plan, environment, state)
            composed = await _compose(runner, plan, environment, state, failure)
            if plan.records_all:
                await episode_log.drift.confirm(plan, plan.started)
        reply, outcome = composed, "answered"
        return reply
    except asyncio.CancelledError:
        if not graceful_shutdown.is_cut_by_shutdown():
            outcome = "disconnected"
            raise
        outcome, error = "draining", graceful_shutdown.shutting_down_error()
        error.spent, error.is_counted = environment.meter.billed, True
        raise error from None
    except ApiError as error:
        error.spent, error.is_counted = environment.meter.billed, True
        raise
    finally:
        if reply is None:
            environment.salvage()
        if settle is not None:
            settle(environment.meter.billed)
        count_episode(metrics, plan, environment, state, runner.rounds, reply, outcome)
        runner.end(state, environment.meter.billed, plan.prompt.model, plan.provenance.tenant)
        episode_log.record(plan, runner, environment, state, reply, outcome)


async def _run(
    runner: ControllerRunner, plan: Plan, environment: LiveEnvironment, state: State
) -> UpstreamError | None:
    """Run the episode to its end, whatever ends it; a failed upstream's error is returned."""
    try:
        async with asyncio.timeout(plan.remaining_s):
            await runner.run(plan.beta.value, environment, state)
        if not plan.records_all and _is_all_cut(environment, state):
            environment.refused, state.stop = "all_cut", Stop.MAX_TOKENS
    except TimeoutError:
        environment.salvage()
        state.end(Stop.DEADLINE)
    except BranchesTruncated:
        environment.salvage()
        environment.refused = "cut_short"
        state.end(Stop.MAX_TOKENS)
    except NotVotable:
        environment.salvage()
        state.end(Stop.NOT_VOTABLE)
    except SentBytesExceeded:
        logger.warning("%s: it has sent more than max_sent_bytes to the upstream; it ends here", plan.request_id)
        environment.salvage()
        environment.refused = "sent_too_much"
        state.end(Stop.MAX_TOKENS)
    except ControllerError as error:
        logger.warning("%s: controller %s failed: %s", plan.request_id, plan.controller, error)
        state.end(Stop.CONTROLLER_ERROR)
    except UpstreamError as error:
        logger.warning("%s: %s", plan.request_id, error.logged)
        environment.salvage()
        state.end(Stop.UPSTREAM_ERROR)
        return error
    return None


def _is_all_cut(environment: LiveEnvironment, state: State) -> bool:
    """Whether the controller answered nothing because the request's limit cut every branch that it had not pruned."""
    if state.stop is not Stop.ANSWERED or state.answer is not None or state.votes:
        return False
    branches = zip(environment.branches, state.branches, strict=False)
    reasons = {live.finish for live, known in branches if live.finish is not None or not known.pruned}
    return reasons == {"length"}


async def _compose(
    runner: ControllerRunner, plan: Plan, environment: LiveEnvironment, state: State, failure: UpstreamError | None
) -> Reply:
    """The reply from what there is; if that is nothing, the error that left it so."""
    if failure is not None and state.answer is None and not state.finished:
        raise failure
    if not environment.branches:
        raise deadline_error()
    left_s = plan.remaining_s
    seconds = None if left_s is None else max(0.0, left_s) + CLOSE_S
    try:
        return await compose_reply(plan, environment, state, runner.rounds, runner.fallback, seconds)
    except UpstreamError as error:
        raise failure or error from None


def _progress(environment: LiveEnvironment, state: State) -> str:
    """What has come of a request so far, in a line."""
    votes = sorted(state.votes.items(), key=lambda vote: -vote[1])[:TOLD_VOTES]
    said = [f"{shorten(environment.labels.written(label), TOLD_CHARS)}: {count}" for label, count in votes]
    told = [f"{state.width} branches", *([f"votes {', '.join(said)}"] if said else [])]
    return f"round {state.rounds}: {', '.join(told)}, {environment.meter.billed:,} tokens\n"


def _least(*bounds: T | None) -> T | None:
    return min((bound for bound in bounds if bound is not None), default=None)
