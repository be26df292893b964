"""Plan a request before its first branch: choose the controller, tokenise the prompt and compute the limits."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any, Final, NamedTuple, TypeVar
from uuid import uuid4

from controllers import Limits, UnknownController
from controllers.builtin import is_admin_only
from controllers.signals import ALL_SIGNALS
from discovery.answers import AUTO, ExtractionMethod
from discovery.data.recordings import DEFAULT_TEMPERATURE, question_text
from proxy import probe_templates
from proxy.admission.token_budget import EpisodeCaps
from proxy.environment import votability
from proxy.episode.agreement import agreement_rule
from proxy.episode.reply import deadline_error
from proxy.errors import BadRequest
from proxy.recording.template_drift import TemplateDrift
from proxy.requests.generation_request import SAMPLING, GenerationRequest
from proxy.rollout.controller_manager import ControllerManager
from proxy.settings import Settings
from proxy.telemetry import logs
from proxy.types import EffectiveBeta, EnvironmentLimits, FinalAnswerLimits, Model, Plan, Prompt, Provenance
from proxy.upstream.client import TooManyTokens
from proxy.upstream.fleet.affinity import affinity_key
from proxy.upstream.fleet.interface import Upstream

T = TypeVar("T", int, float)

CONTEXT_EXCEEDED: Final = "context_length_exceeded"
"""Error code of a prompt that is too long. Gateways recognise this code, or the beginning of OpenAI's message."""
PROMPT_TAIL = 8
"""Number of last token ids of the prompt that are detokenised. They show whether the template opened a thought."""


class _Sizes(NamedTuple):
    """Sizes in tokens that do not depend on the token cap."""

    context: int
    prompt: int
    close: int  # what closes a thought
    suffix: int  # what asks for an answer


class _Lengths(NamedTuple):
    """How the tokens of a request are divided."""

    branch: int  # most of one branch
    finalise: int  # most of a free final answer
    reserve: int  # part of the cap that branches may not spend
    least: int  # smallest cap that pays for one interval and its answer, with this reserve
    ahead: int | None  # most that the votability check may generate ahead
    cut_probes: int | None  # most probes of branches that a stop string cut


class _RequestLimits(NamedTuple):
    environment: EnvironmentLimits
    episode: Limits
    final_answer: FinalAnswerLimits


async def plan_request(
    engine: Upstream,
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
    started: float | None = None,
) -> Plan:
    """Return the plan of a request. Nothing is generated.

    `caps` are the caller's limits. `drift` provides the hash of the chat template; it is None if the request is not
    recorded. Without `request_id` a new id is created. The deadline counts from `started`, by default now, on the
    monotonic clock. Raises BadRequest or UpstreamError.
    """
    now = time.monotonic()
    started = now if started is None else started
    has_no_vote = is_admin_only(request.tts.controller or "") or request.ignore_eos
    rule = None if has_no_vote else agreement_rule(request.tts, settings, beta)
    if request.tts.answer.method is ExtractionMethod.TOOLS:
        raise no_tools()
    if request.tts.code is not None:
        raise useless_code_options()
    if request.tts.answer.is_judged and not request.tts.answer.runs_code:
        kind = request.tts.answer
        raise BadRequest(
            f'tts.answer is "{kind}", and text completions are not compared; use chat completions or Responses',
            param="tts.answer",
        )
    request_id = request_id or f"chatcmpl-{uuid4().hex}"
    logs.request_id.set(request_id)
    deadline_s = smallest(request.tts.deadline_s, settings.deadline_s)
    affinity = affinity_key(request)
    engine = engine.route(model.id, lambda: affinity)
    async with fail_after(None if deadline_s is None else started + deadline_s - now):
        try:
            choice = await controllers.choose(request.tts.controller, request_id, model.id)
        except UnknownController as error:
            raise unknown_controller(error) from None
        chat_template = "" if drift is None else await drift.template_hash(model.id)
        ids, text = await _read_prompt(engine, model, request)
        tail = await engine.detokenise(model.id, ids[-PROMPT_TAIL:])
        template = probe_templates.template_for(
            settings.probe_family, tail, close=settings.probe_close, lead=settings.probe_lead
        )
        limits = await _limits(engine, settings, caps, model, request, len(ids), template)
    sampling = sampling_of(request, settings)
    return Plan(
        request_id=request_id,
        created=int(time.time()),
        started=started,
        beta=beta,
        choice=choice,
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
            priority=request.priority,
            asks_for_answer=votability.asks_for_answer(last_user_text(request.conversation) or text),
        ),
        environment_limits=limits.environment,
        limits=limits.episode,
        final_answer_limits=limits.final_answer,
        deadline_s=deadline_s,
        temperature=sampling.get("temperature"),
        provenance=Provenance(tenant, text, recorded_sampling(request, sampling), chat_template),
        streamed=bool(request.stream),
        signals=ALL_SIGNALS if request.tts.signals else controllers.signals_for(choice, model.id),
        agreement_rule=rule,
        affinity=affinity,
    )


def sampling_of(request: GenerationRequest, settings: Settings) -> dict[str, Any]:
    """Return the sampling parameters of branches. At temperature 0 they are those of all branches but the first."""
    sampling = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    if request.temperature == 0:  # equal branches would make voting useless, so only the first branch is greedy
        del sampling["temperature"]
        if settings.branch_temperature is not None:
            sampling["temperature"] = settings.branch_temperature
    if request.ignore_eos:
        sampling["ignore_eos"] = True
    return sampling


def no_tools() -> BadRequest:
    """Return the error for a request whose tool calls shall be voted on, and that has no tools."""
    return BadRequest('tts.answer is "tools", and the request has no tools; send some', param="tts.answer")


def useless_code_options() -> BadRequest:
    """Return the error for a request with `tts.code` whose replies are not compared by what their functions return."""
    return BadRequest(
        'tts.code has no effect unless tts.answer is "code" in a chat completion or a response; leave it out',
        param="tts.code",
    )


def unknown_controller(error: UnknownController) -> BadRequest:
    """Return the error for a request that names an unknown controller."""
    return BadRequest(str(error), param="tts.controller", code="unknown_controller")


@asynccontextmanager
async def fail_after(seconds: float | None) -> AsyncIterator[None]:
    """Limit the time before the first branch. Raises UpstreamTimeout after `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise deadline_error() from None


async def _read_prompt(engine: Upstream, model: Model, request: GenerationRequest) -> tuple[Sequence[int], str]:
    """Return the prompt's ids and the text of the question. Raises BadRequest for a prompt that is far too long."""
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
            f"This model's maximum context length is {most} tokens. However, `{request.prompt_field}` has many more. "
            "Shorten the prompt",
            param=request.prompt_field,
            code=CONTEXT_EXCEEDED,
        ) from None


def last_user_text(conversation: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of the user's last message in a conversation; empty if there is none."""
    user_contents = (message.get("content") for message in reversed(conversation) if message.get("role") == "user")
    content = next(user_contents, None)
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def recorded_sampling(request: GenerationRequest, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that determine how branches are sampled and read, as they are recorded.

    Template fields and patterns are the client's text, so only their hash is recorded.
    """
    recorded = dict(sampling)
    if request.temperature == 0:
        recorded["branch_temperature"] = sampling.get("temperature", DEFAULT_TEMPERATURE)
        recorded["temperature"] = request.temperature
    if request.tts.answer != AUTO:
        kind = request.tts.answer
        is_pattern = kind.method is ExtractionMethod.REGEX
        recorded["answer"] = f"{kind.method}:{text_hash(kind.argument)}" if is_pattern else str(kind)
    if request.branch_limit is not None:
        recorded["max_tokens"] = request.branch_limit
    if not request.conversation:
        recorded["prompt"] = "raw"
    if fields := request.template_fields:
        recorded["template_fields"] = text_hash(json.dumps(fields, sort_keys=True))
    return recorded


def text_hash(text: str) -> str:
    """Return a short hash of a client's text, which is recorded in its place."""
    return blake2b(text.encode(), digest_size=4).hexdigest()


async def _limits(
    engine: Upstream,
    settings: Settings,
    caps: EpisodeCaps,
    model: Model,
    request: GenerationRequest,
    prompt: int,
    template: probe_templates.Template,
) -> _RequestLimits:
    """Return limits with which a branch, its probes and its final answer fit the model's context and the token cap.

    `prompt` is the prompt's length in tokens. Raises BadRequest if one interval and its answer do not fit.
    """
    sizes = _Sizes(
        context=model.max_length,
        prompt=prompt,
        close=len(await engine.tokenise_suffix(model.id, template.longest_closing)),
        suffix=len(await engine.tokenise_suffix(model.id, template.longest_suffix)),
    )
    cap = smallest(request.tts.max_total_tokens, caps.tokens)
    lengths = _lengths(settings, request, sizes, cap)
    if cap is not None and cap < lengths.least:
        least = _least_cap(settings, request, sizes, lengths.least)
        if caps.prompts > 1:  # the shorter the prompt, the more an interval and its answer may take
            least = _least_cap(settings, request, sizes._replace(prompt=0), least)
        raise _cap_error(caps, request.tts.max_total_tokens, cap, least)
    probe = settings.probe_tokens
    return _RequestLimits(
        EnvironmentLimits(
            settings.interval,
            lengths.branch,
            probe,
            lengths.ahead,
            sent_bytes=settings.max_sent_bytes,
            cut_probes=lengths.cut_probes,
        ),
        Limits(
            interval=settings.interval,
            max_branches=caps.branches,
            branch_tokens=lengths.branch,
            probe_tokens=sizes.suffix + probe,
            max_tokens=None if cap is None else cap - lengths.reserve,
        ),
        FinalAnswerLimits(lengths.finalise, probe),
    )


def _lengths(settings: Settings, request: GenerationRequest, sizes: _Sizes, cap: int | None) -> _Lengths:
    """Return how the tokens of a branch, its answer and the reserve are divided under a token cap.

    Raises BadRequest if the prompt leaves no room in the model's context.
    """
    context, prompt, close, suffix = sizes
    probe = settings.probe_tokens
    finalise = min(settings.finalise_tokens, (context - prompt) // 4)
    if cap is not None:
        finalise = max(probe, min(finalise, cap // 4))
    if request.branch_limit is not None:  # the client reads this answer, so the limit holds for it too
        finalise = min(finalise, max(probe, request.branch_limit))
    room = context - prompt - max(close + finalise, suffix + max(probe, finalise))
    if room < 1:
        needed = context - prompt - room + 1
        instead = ", or send it without β" if prompt < context else ""
        raise BadRequest(
            f"This model's maximum context length is {context} tokens. However, your prompt has {prompt} "
            f"tokens, and with β a reply needs at least {needed} more. Shorten the prompt{instead}",
            param=request.prompt_field,
            code=CONTEXT_EXCEEDED,
        )
    branch = min(room, request.branch_limit or room)
    interval = min(settings.interval, branch)
    reserve = close + finalise + suffix + probe
    ahead = None
    if cap is not None and not request.tts.answer.is_declared_votable:  # reserve what the votability check may cost
        reserve += suffix + probe
        ahead = max(0, cap - reserve - interval) // 8
        reserve += ahead
    cut_probes = None
    if cap is not None and request.stop_strings:
        cut_probes = max(0, cap - reserve - interval) // 8 // (suffix + probe)
        reserve += cut_probes * (suffix + probe)
    return _Lengths(branch, finalise, reserve, reserve + interval, ahead, cut_probes)


def _least_cap(settings: Settings, request: GenerationRequest, sizes: _Sizes, least: int) -> int:
    """Return the smallest token cap from `least` on that fits its own lengths, because a larger cap reserves more.

    Raises BadRequest if the prompt leaves no room in the model's context for it.
    """
    while (needed := _lengths(settings, request, sizes, least).least) > least:
        least = needed
    return least


def _cap_error(caps: EpisodeCaps, own: int | None, cap: int, least: int) -> BadRequest:
    """Return the error for a token cap below `least`, which suffices for each prompt.

    `own` is the client's limit for all prompts of its request.
    """
    several = caps.prompts > 1
    is_clients = own is not None and cap == max(1, own // caps.prompts)
    source = caps.source or "the server's limit AUTOTTS_MAX_TOTAL_TOKENS"
    if is_clients and not several:
        source = "tts.max_total_tokens"
    if own is None and caps.share_source is not None:
        remedy = "set tts.max_total_tokens"
    else:
        remedy = "raise it" if is_clients else "ask for shorter replies, or ask the operator to raise it"
    needs = "each needs up to" if several else "this request needs at least"
    total = f", {caps.prompts * least} in all" if several else ""
    return BadRequest(
        f"{source} is {cap} tokens; {needs} {least} for one interval and its answer{total}; {remedy}",
        param="tts.max_total_tokens" if is_clients else None,
        code="cap_too_small",
    )


def smallest(*limits: T | None) -> T | None:
    """Return the smallest limit that is set, or None."""
    return min((limit for limit in limits if limit is not None), default=None)
