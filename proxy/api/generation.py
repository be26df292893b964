"""Generation endpoints. A controller serves a request if β is set and it can; other requests are forwarded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from controllers import Stop
from controllers.builtin import is_admin_only
from discovery.store import prompt_name
from proxy.admission.auth import Caller
from proxy.admission.request_slot import RequestSlot
from proxy.api.formats import chat_completions, completions, responses
from proxy.api.formats.endpoint_format import Format, PromptNews, RoundNews
from proxy.api.formats.prompt_batch import BEGUN_TOGETHER, Batch, together
from proxy.api.forwarding import DisconnectCounter, ForwardEndpoints
from proxy.api.service import Service
from proxy.episode.plan import CONTEXT_EXCEEDED, fail_after, plan_request
from proxy.episode.progress import RoundReport
from proxy.episode.reply_plan import plan_reply
from proxy.episode.run import record_unstarted, serve_request
from proxy.episode.tts_object import early_headers, reply_headers
from proxy.errors import BadRequest, DeadlinePassed
from proxy.http.access_log import LoggedEpisodes
from proxy.http.sse import StreamedResponse, cancel_on_disconnect, progress_and_result
from proxy.passthrough.unapplied_beta import GREEDY, NO_BETA
from proxy.recording.template_drift import TemplateDrift
from proxy.requests import beta, strict_json
from proxy.requests.anthropic_request import NO_CONTROLLER, MessagesRequest
from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.generation_request import GenerationRequest, PassThroughReason
from proxy.requests.parsing import parse_request
from proxy.requests.responses_request import ResponsesRequest
from proxy.telemetry import logs
from proxy.types import EffectiveBeta, Model, Plan, Reply

CHAT: Final = Format(ChatRequest, "chatcmpl-", chat_completions.to_json, chat_completions.stream)
COMPLETIONS: Final = Format(CompletionRequest, "cmpl-", completions.to_json, completions.stream)
RESPONSES: Final = Format(ResponsesRequest, "resp_", responses.to_json, responses.stream)

_Report = Callable[[RoundReport], None]


class GenerationEndpoints:
    """The endpoints `/v1/chat/completions`, `/v1/completions` and `/v1/responses`."""

    def __init__(self, service: Service, forwarding: ForwardEndpoints) -> None:
        self._service = service
        self._forwarding = forwarding

    async def chat_completions(self, request: Request) -> Response:
        """Handle POST /v1/chat/completions."""
        return await self._generate(CHAT, request)

    async def completions(self, request: Request) -> Response:
        """Handle POST /v1/completions."""
        return await self._generate(COMPLETIONS, request)

    async def responses(self, request: Request) -> Response:
        """Handle POST /v1/responses."""
        return await self._generate(RESPONSES, request)

    async def messages(self, request: Request) -> Response:
        """Handle POST /v1/messages of Anthropic's API, which the upstream answers within the caller's budget."""
        service = self._service
        raw = await service.bodies.read(request)
        parsed = parse_request(MessagesRequest, raw)
        model, alias = await service.models.find(parsed.model)
        effective_beta = self._resolve_beta(request, parsed, model, alias)
        return await self._forwarding.generate(request, parsed, raw, model, effective_beta, NO_CONTROLLER)

    async def _generate(self, form: Format, request: Request) -> Response:
        service = self._service
        raw = await service.bodies.read(request)
        parsed = parse_request(form.model, raw)
        if parsed.tts.progress == "rounds" and form is RESPONSES:
            raise BadRequest(
                'tts.progress: "rounds" is for chat and text completions; use true, which reports rounds as reasoning',
                param="tts.progress",
            )
        caller: Caller = request.state.caller
        is_recording = is_admin_only(parsed.tts.controller or "")
        if is_recording:
            service.authenticator.require_admin(caller, f"controller {parsed.tts.controller}")
        elif parsed.tts.signals:
            raise BadRequest(
                "tts.signals: only the controller everything records signals; name it, or leave signals out",
                param="tts.signals",
            )
        model, alias = await service.models.find(parsed.model)
        effective_beta = self._resolve_beta(request, parsed, model, alias)
        if effective_beta is None:
            return await self._forwarding.generate(request, parsed, raw, model, None, NO_BETA)
        unserved = _why_unserved(parsed, effective_beta, is_recording=is_recording)
        if unserved is not None:
            return await self._forwarding.generate(request, parsed, raw, model, effective_beta, unserved)
        if parsed.tts.controller is None and service.betas.is_single(effective_beta, parsed, model):
            parsed = parsed.with_controller("single")
        if not (parsed.tts.required or is_recording):
            effective_beta = effective_beta.scaled(await service.load_shedding.beta_factor())
        name = f"{form.prefix}{uuid4().hex}"
        prompts = parsed.split_by_prompt()
        if len(prompts) > 1:
            return await self._generate_each(request, prompts, model, effective_beta, name)
        slot = await service.request_slots.acquire_episode(request, parsed.tts.max_total_tokens)
        if parsed.whole_reply_reason() is None:
            planning = self._plan(request, parsed, model, effective_beta, slot, name)
        else:
            planning = self._plan_reply(request, parsed, raw, model, effective_beta, slot, name)
        try:
            with DisconnectCounter(service.metrics, model.id):
                traced = service.tracer.plan(request.scope["path"], model.id, request.state.leases, planning)
                plan = await cancel_on_disconnect(request.receive, traced)
        except BadRequest as error:
            if error.code != CONTEXT_EXCEEDED or not parsed.truncates:
                raise
            slot.release()
            unserved = PassThroughReason("truncation", "truncation")
            return await self._forwarding.generate(request, parsed, raw, model, effective_beta, unserved)
        service.recent.add_client_id(caller.tenant, logs.client_request_id.get(), plan.request_id)
        if not parsed.stream:
            reply = await cancel_on_disconnect(request.receive, self._serve(request, slot, plan))
            return JSONResponse(form.to_json(parsed, reply), headers=reply_headers(reply.plan, reply.tts))
        news: asyncio.Queue[RoundNews] = asyncio.Queue()
        report = _reporting(parsed, news.put_nowait)
        updates = progress_and_result(lambda: self._serve(request, slot, plan, report), news, service.settings.ping_s)
        return StreamedResponse.of(form.stream(parsed, plan, updates), early_headers(plan))

    def _resolve_beta(
        self, request: Request, parsed: GenerationRequest, model: Model, alias: float | None
    ) -> EffectiveBeta | None:
        beta.check_headers(request.scope["headers"])
        betas = self._service.betas
        target = None if parsed.tts.target_tokens is None else partial(betas.beta_for_tokens, model.id, parsed.tts)
        return beta.resolve(
            request.headers.getlist(beta.HEADER),
            body=parsed.tts.beta,
            effort=parsed.effort,
            alias=alias,
            model=model.id,
            default=betas.default_for(model.id, request.state.caller.beta),
            target=target,
        )

    def _plan(
        self,
        request: Request,
        parsed: GenerationRequest,
        model: Model,
        effective_beta: EffectiveBeta,
        slot: RequestSlot,
        name: str,
        started: float | None = None,
    ) -> Coroutine[Any, Any, Plan]:
        service, caller = self._service, request.state.caller
        caller.fields_to_drop(parsed.model_extra or {})  # refuses a priority that the key may not set
        return plan_request(
            service.engine,
            service.controllers,
            service.settings,
            slot.caps,
            model,
            parsed,
            effective_beta,
            tenant=caller.tenant,
            drift=self._drift(parsed),
            salt=caller.salt or parsed.cache_salt,
            request_id=name,
            started=started,
        )

    def _plan_reply(
        self,
        request: Request,
        parsed: GenerationRequest,
        raw: bytes,
        model: Model,
        effective_beta: EffectiveBeta,
        slot: RequestSlot,
        name: str,
    ) -> Coroutine[Any, Any, Plan]:
        service, caller = self._service, request.state.caller
        drop = caller.fields_to_drop(parsed.model_extra or {})
        body = {field: value for field, value in strict_json.read_object(raw).items() if field not in drop}
        return plan_reply(
            service.controllers,
            service.settings,
            slot.caps,
            model,
            parsed,
            parsed.chat_body(body),
            effective_beta,
            tenant=caller.tenant,
            salt=caller.salt or parsed.cache_salt,
            request_id=name,
            drift=self._drift(parsed),
        )

    def _drift(self, parsed: GenerationRequest) -> TemplateDrift | None:
        """Return what knows the chat template's hash, if the request is recorded."""
        service = self._service
        is_kept = service.episode_log.writer.is_on or is_admin_only(parsed.tts.controller or "")
        return service.drift if is_kept else None

    async def _generate_each(
        self,
        request: Request,
        prompts: Sequence[GenerationRequest],
        model: Model,
        effective_beta: EffectiveBeta,
        name: str,
    ) -> Response:
        """Run one episode for each prompt of a request, and return one response."""
        service, parsed, path = self._service, prompts[0], request.scope["path"]
        slots = await service.request_slots.acquire_episodes(request, parsed.tts.max_total_tokens, len(prompts))
        news: asyncio.Queue[PromptNews] = asyncio.Queue()
        started = time.monotonic()

        def planning(index: int) -> Coroutine[Any, Any, Plan]:
            named = prompt_name(name, index)
            return self._plan(request, prompts[index], model, effective_beta, slots[index], named, started)

        async def plan_all() -> list[Plan]:
            plans = [await service.tracer.plan(path, model.id, request.state.leases, planning(0))]
            for start in range(1, len(prompts), BEGUN_TOGETHER):
                indices = range(start, min(start + BEGUN_TOGETHER, len(prompts)))
                plans += await together([planning(index) for index in indices], lambda _: 0)
            return plans

        async def serve(index: int) -> Reply:
            for _ in range(index // BEGUN_TOGETHER):
                await asyncio.sleep(0)  # let other requests run before the next prompts begin
            logs.request_id.set(plans[index].request_id)
            report = _reporting(parsed, lambda round_news: news.put_nowait(PromptNews(index, round_news)))
            reply = await self._run(request, slots[index], plans[index], report)
            news.put_nowait(PromptNews(index, reply))
            return reply

        async def serve_all() -> Batch:
            work = [serve(index) for index in range(len(plans))]
            return Batch(name, await together(work, lambda reply: sum(reply.tokens.values())))

        with DisconnectCounter(service.metrics, model.id):
            plans = await cancel_on_disconnect(request.receive, plan_all())
        logs.request_id.set(name)
        tenant, first = request.state.caller.tenant, plans[0].request_id  # both ids refer to the first prompt
        service.recent.add_alias(tenant, name, first)
        service.recent.add_client_id(tenant, logs.client_request_id.get(), first)
        if not parsed.stream:
            batch = await cancel_on_disconnect(request.receive, service.tracer.episode(plans[0], serve_all()))
            return JSONResponse(completions.batch_to_json(batch), headers=batch.headers)
        updates = progress_and_result(
            lambda: service.tracer.episode(plans[0], serve_all()), news, service.settings.ping_s
        )
        events = completions.stream_batch(parsed, name, plans, updates)
        return StreamedResponse.of(events, {**early_headers(plans[0]), "x-request-id": name})

    async def _serve(self, request: Request, slot: RequestSlot, plan: Plan, report: _Report | None = None) -> Reply:
        return await self._service.tracer.episode(plan, self._run(request, slot, plan, report))

    async def _run(self, request: Request, slot: RequestSlot, plan: Plan, report: _Report | None) -> Reply:
        service = self._service

        def end(tokens: int, stop: str | None) -> None:
            slot.settle(tokens)
            if stop is not None:
                first = LoggedEpisodes(plan.controller, plan.beta.value)
                request.scope["state"].setdefault("episodes", first).add(tokens, stop)

        async with AsyncExitStack() as stack:
            stack.enter_context(service.controllers.serving(plan.choice.spec))
            with DisconnectCounter(service.metrics, plan.prompt.model):
                try:
                    async with fail_after(plan.remaining_s):
                        await stack.enter_async_context(slot)
                except DeadlinePassed:
                    end(0, Stop.DEADLINE)
                    record_unstarted(service.engine, service.grading, service.controllers, service.episode_log, plan)
                    raise
            reply = await serve_request(
                service.engine,
                service.grading,
                service.controllers,
                service.metrics,
                service.episode_log,
                plan,
                report,
                end,
                partial(service.request_slots.warn_of_cut, slot.caps),
            )
            slot.add_prompt(reply.prompt_tokens)
            return reply


def _reporting(parsed: GenerationRequest, put: Callable[[RoundNews], None]) -> _Report | None:
    """Return what is called after each round: it puts the progress in the form that the request asks for."""
    if parsed.tts.progress == "rounds":
        return lambda report: put({"progress": report.as_json()})
    return (lambda report: put(report.line)) if parsed.tts.progress else None


def _why_unserved(
    parsed: GenerationRequest, effective_beta: EffectiveBeta, *, is_recording: bool
) -> PassThroughReason | None:
    """Return why no controller serves a request that has a β, or None. Judged replies are not recorded."""
    unserved = parsed.pass_through_reason()
    if unserved is None and is_recording and parsed.tts.answer.is_judged:
        unserved = PassThroughReason("answer", "tts.answer")
    if unserved is None and parsed.temperature == 0 and not effective_beta.is_from_client:
        return GREEDY
    return unserved
