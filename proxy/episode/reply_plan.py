"""Plan a request whose branches are whole replies of the upstream. The upstream tokenises the prompt itself."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from controllers import Limits, UnknownController
from controllers.builtin import is_admin_only
from discovery.answers import AUTO, AnswerKind, ExtractionMethod
from discovery.answers.code import MAX_EXAMPLES, CodeExample, CodeTask, read_examples
from discovery.data.recordings import REPLY, REPLY_FIELDS, question_text
from proxy.admission.token_budget import EpisodeCaps
from proxy.environment import votability
from proxy.episode.agreement import agreement_rule
from proxy.episode.plan import (
    fail_after,
    last_user_text,
    no_tools,
    recorded_sampling,
    sampling_of,
    smallest,
    text_hash,
    unknown_controller,
    useless_code_options,
)
from proxy.errors import BadRequest, UpstreamError
from proxy.recording.template_drift import TemplateDrift
from proxy.reply_request import JudgeLimits, ReplyRequest
from proxy.requests.field_table import WHOLE_REPLY, first_effective_field
from proxy.requests.generation_request import CodeOptions, GenerationRequest
from proxy.requests.reply_fields import ReplyFields, forwarded_fields, read_reply_fields
from proxy.rollout.controller_manager import ControllerManager
from proxy.settings import Settings
from proxy.telemetry import logs
from proxy.types import (
    EffectiveBeta,
    EnvironmentLimits,
    FinalAnswerLimits,
    Model,
    Plan,
    Prompt,
    Provenance,
)
from proxy.upstream.fleet.affinity import affinity_key

TOOLS = AnswerKind(ExtractionMethod.TOOLS)
JSON = AnswerKind(ExtractionMethod.JSON)
SELECT = AnswerKind(ExtractionMethod.SELECT)
MAX_CANDIDATES = 16
"""Maximum branches of a request whose replies the model compares."""
LEAST_JUDGED = 512
"""Tokens below which no half of a token cap is reserved for the judge: its prompt would not fit."""
MAX_UNKNOWN_LENGTH = 2**20
"""Maximum tokens of a branch if neither the upstream nor the client limits it."""


async def plan_reply(
    controllers: ControllerManager,
    settings: Settings,
    caps: EpisodeCaps,
    model: Model,
    request: GenerationRequest,
    body: Mapping[str, Any],
    beta: EffectiveBeta,
    *,
    tenant: str,
    salt: str | None,
    request_id: str,
    drift: TemplateDrift | None = None,
) -> Plan:
    """Return the plan of a chat request that only the upstream can apply to whole replies.

    `body` has the fields of the request that may be sent. `caps` are the caller's limits. `drift` provides the hash of
    the chat template; it is None if the request is not recorded. Raises BadRequest or UpstreamError.
    """
    started = time.monotonic()
    logs.request_id.set(request_id)
    has_no_vote = is_admin_only(request.tts.controller or "") or request.ignore_eos
    rule = None if has_no_vote else agreement_rule(request.tts, settings, beta)
    fields = read_reply_fields(body, request.reply_field_names)
    kind = _kind(request, fields)
    code = _code_task(request, kind)
    compared = SELECT if kind.is_judged and code is None else kind  # without a vote, the model compares them
    try:
        choice = await controllers.choose_for_replies(request.tts.controller, compared, model.id)
    except UnknownController as error:
        raise unknown_controller(error) from None
    deadline_s = smallest(request.tts.deadline_s, settings.deadline_s)
    async with fail_after(deadline_s):
        chat_template = await _template_hash(drift, model, is_needed=is_admin_only(request.tts.controller or ""))
    sent = forwarded_fields(body, model.id)
    limit, environment_limits, judge = _limits(settings, caps, model, request, kind)
    reply = ReplyRequest(
        body=sent,
        tools=fields.tools,
        exclude=() if request.tts.tools is None else request.tts.tools.exclude,
        expects_json=fields.expects_json,
        schema=fields.schema,
        judge=judge,
        code=code,
        branch_tokens=smallest(model.max_length or None, request.branch_limit) or MAX_UNKNOWN_LENGTH,
    )
    if rule is not None and not reply.has_votes:  # more replies would not agree more
        rule = rule._replace(escalate_beta=None)
    sampling = sampling_of(request, settings)
    return Plan(
        request_id=request_id,
        created=int(time.time()),
        started=started,
        beta=beta,
        choice=choice,
        prompt=Prompt(
            model=model.id,
            ids=(),
            tail="",
            sampling=sampling,
            greedy_first=request.temperature == 0,
            stop=request.stop_strings,
            seed=request.seed,
            kind=kind,
            salt=salt,
            priority=request.priority,
            asks_for_answer=votability.asks_for_answer(last_user_text(request.conversation)),
        ),
        environment_limits=environment_limits,
        limits=limit,
        final_answer_limits=FinalAnswerLimits(0, 0),
        deadline_s=deadline_s,
        temperature=sampling.get("temperature"),
        provenance=Provenance(
            tenant, question_text(request.conversation, sent), _recorded(request, kind, sampling, sent), chat_template
        ),
        streamed=bool(request.stream),
        reply=reply,
        max_length=model.max_length,
        agreement_rule=rule,
        affinity=affinity_key(request),
    )


async def _template_hash(drift: TemplateDrift | None, model: Model, *, is_needed: bool) -> str:
    """Return the hash of the model's chat template; empty if it is unknown. Raises UpstreamError if it is needed."""
    try:
        return "" if drift is None else await drift.template_hash(model.id)
    except UpstreamError:
        if is_needed:
            raise
        return ""  # the upstream renders the prompt itself, so that only the recording fails


def _kind(request: GenerationRequest, fields: ReplyFields) -> AnswerKind:
    """Return the kind of vote that the request names. If it names none, its tools and its reply format decide."""
    named = request.tts.answer
    if named == TOOLS and not fields.tools:
        raise no_tools()
    is_text = named.runs_code or named.method is ExtractionMethod.SYNTHESISE
    if is_text and (fields.tools or fields.expects_json):
        other = "tools" if fields.tools else "JSON"
        raise BadRequest(
            f'tts.answer is "{named}", which needs replies of text, and the request has {other}; use "select"',
            param="tts.answer",
        )
    if named != AUTO:
        return named
    return TOOLS if fields.tools else JSON if fields.expects_json else AUTO


def _code_task(request: GenerationRequest, kind: AnswerKind) -> CodeTask | None:
    """Return the examples with which functions in the replies are called; None if there are none."""
    options = request.tts.code
    if not kind.runs_code:
        if options is not None:
            raise useless_code_options()
        return None
    options = options or CodeOptions()
    task = read_examples(last_user_text(request.conversation), options.function or "")
    stated = {example.arguments for example in task.examples}
    given = [CodeExample(arguments) for arguments in options.arguments if arguments not in stated]
    examples = [*given, *task.examples][:MAX_EXAMPLES]
    return CodeTask(task.function, examples) if examples else None


def _limits(
    settings: Settings, caps: EpisodeCaps, model: Model, request: GenerationRequest, kind: AnswerKind
) -> tuple[Limits, EnvironmentLimits, JudgeLimits | None]:
    """Return the limits of the episode. Under a token cap no branch can exceed the cap.

    The judge reads about as many tokens as the branches generate, so half of the cap is reserved for it.
    """
    total = cap = smallest(request.tts.max_total_tokens, caps.tokens)
    if cap is not None and kind.is_judged and cap // 2 >= LEAST_JUDGED:
        cap -= cap // 2
    branch = smallest(model.max_length or None, request.branch_limit, cap) or MAX_UNKNOWN_LENGTH
    limits = Limits(
        interval=settings.interval,
        max_branches=min(caps.branches, MAX_CANDIDATES) if kind.is_judged else caps.branches,
        branch_tokens=branch,
        max_tokens=cap,
        has_probes=False,
        has_pauses=False,
    )
    judge = None
    if kind.is_judged:
        writes = kind.method is ExtractionMethod.SYNTHESISE
        judge = JudgeLimits(writes, branch if writes else settings.judge_tokens, total)
    return limits, EnvironmentLimits(settings.interval, branch, 0, sent_bytes=settings.max_sent_bytes, cap=cap), judge


def _recorded(
    request: GenerationRequest, kind: AnswerKind, sampling: Mapping[str, Any], sent: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters that determine how branches are sampled and compared.

    Tools and the format of the reply belong to the question. The client's texts are recorded as hashes.
    """
    recorded = recorded_sampling(request, sampling)
    if kind in (TOOLS, JSON):
        recorded["answer"] = str(kind)
    elsewhere = (*REPLY_FIELDS, "logprobs", "top_logprobs")
    for name in WHOLE_REPLY:
        value = sent.get(name)
        if name not in elsewhere and first_effective_field([(name, value)], WHOLE_REPLY):
            is_number = isinstance(value, bool | int | float)
            recorded[name] = value if is_number else text_hash(json.dumps(value, sort_keys=True))
    if request.tts.tools is not None and request.tts.tools.exclude:
        recorded["exclude"] = text_hash(json.dumps(sorted(request.tts.tools.exclude)))
    return {**recorded, "branch": REPLY}
