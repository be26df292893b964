"""Format of `/v1/responses`: the Response object, and the events that stream it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from proxy import errors
from proxy.api.formats.endpoint_format import EpisodeNews
from proxy.errors import ApiError
from proxy.http.sse import PING, format_event, split_text
from proxy.requests.responses_request import ResponsesRequest
from proxy.types import Message, Plan, Reply


def to_json(request: ResponsesRequest, reply: Reply) -> dict[str, Any]:
    """Return a finished `response`."""
    message = reply.message
    output = _output_items(reply.plan, message)
    if message.reasoning and request.include_reasoning is not False:
        output.insert(0, _reasoning_item(reply.plan, "", message.reasoning))
    return _finished_response(request, reply, output)


async def stream(request: ResponsesRequest, plan: Plan, news: EpisodeNews) -> AsyncGenerator[bytes]:
    """Stream a response event by event. Progress is the summary of the reasoning."""
    events = _Events(plan)
    yield events.event("response.created", response=_response(request, plan, "in_progress"))
    yield events.event("response.in_progress", response=_response(request, plan, "in_progress"))
    summary = ""
    try:
        async with aclosing(news) as items:
            async for item in items:
                if item is None:
                    yield PING
                elif isinstance(item, str):
                    for data in events.summary_delta(item, is_first=not summary):
                        yield data
                    summary += item
                elif isinstance(item, Reply):
                    reply = item
    except ApiError as error:  # the status has been sent, so the error must be an event
        fields = {"code": error.code, "message": error.message, "param": error.param}
        yield events.event("error", **fields, **errors.body(error))
        failed = {"code": "server_error", "message": error.message}
        yield events.event("response.failed", response=_response(request, plan, "failed", error=failed))
        return
    output: list[dict[str, Any]] = []
    reasoning = "" if request.include_reasoning is False else reply.message.reasoning or ""
    if summary or reasoning:
        output.append(_reasoning_item(plan, summary, reasoning))
        for data in events.reasoning(output[0]):
            yield data
    for made in _output_items(plan, reply.message):
        write = events.message if made["type"] == "message" else events.function_call
        for data in write(made, len(output)):
            yield data
        output.append(made)
    done = _finished_response(request, reply, output)
    yield events.event(f"response.{done['status']}", response=done, tts=reply.tts)


class _Events:
    """Server-sent events of one response, with sequence numbers."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._number = 0

    def event(self, kind: str, **data: Any) -> bytes:
        """Return an event of one kind."""
        formatted = format_event({"type": kind, "sequence_number": self._number, **data}, kind)
        self._number += 1
        return formatted

    def summary_delta(self, line: str, *, is_first: bool) -> Iterator[bytes]:
        """Yield the events that add a line of progress to the reasoning summary."""
        at: dict[str, Any] = {"item_id": _id(self._plan, "rs"), "output_index": 0}
        if is_first:
            item = {**_reasoning_item(self._plan, "", ""), "status": "in_progress"}
            yield self.event("response.output_item.added", output_index=0, item=item)
            part = {"type": "summary_text", "text": ""}
            yield self.event("response.reasoning_summary_part.added", **at, summary_index=0, part=part)
        yield self.event("response.reasoning_summary_text.delta", **at, summary_index=0, delta=line)

    def reasoning(self, item: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the events that complete the reasoning item."""
        at: dict[str, Any] = {"item_id": item["id"], "output_index": 0}
        for part in item["summary"]:
            yield self.event("response.reasoning_summary_text.done", **at, summary_index=0, text=part["text"])
            yield self.event("response.reasoning_summary_part.done", **at, summary_index=0, part=part)
        if not item["summary"]:
            empty = {**item, "content": [], "status": "in_progress"}
            yield self.event("response.output_item.added", output_index=0, item=empty)
        at["content_index"] = 0
        for part in item["content"]:
            yield self.event("response.content_part.added", **at, part={**part, "text": ""})
            for piece in split_text(part["text"]):
                yield self.event("response.reasoning_text.delta", **at, delta=piece)
            yield self.event("response.reasoning_text.done", **at, text=part["text"])
            yield self.event("response.content_part.done", **at, part=part)
        yield self.event("response.output_item.done", output_index=0, item=item)

    def message(self, item: Mapping[str, Any], index: int) -> Iterator[bytes]:
        """Yield the events of the message item."""
        at: dict[str, Any] = {"item_id": item["id"], "output_index": index, "content_index": 0}
        part = item["content"][0]
        empty = {**item, "content": [], "status": "in_progress"}
        yield self.event("response.output_item.added", output_index=index, item=empty)
        yield self.event("response.content_part.added", **at, part={**part, "text": ""})
        for piece in split_text(part["text"]):
            yield self.event("response.output_text.delta", **at, delta=piece, logprobs=[])
        yield self.event("response.output_text.done", **at, text=part["text"], logprobs=[])
        yield self.event("response.content_part.done", **at, part=part)
        yield self.event("response.output_item.done", output_index=index, item=item)

    def function_call(self, item: Mapping[str, Any], index: int) -> Iterator[bytes]:
        """Yield the events of a function call."""
        at: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        empty = {**item, "arguments": "", "status": "in_progress"}
        yield self.event("response.output_item.added", output_index=index, item=empty)
        for piece in split_text(item["arguments"]):
            yield self.event("response.function_call_arguments.delta", **at, delta=piece)
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield self.event("response.function_call_arguments.done", **at, **done)
        yield self.event("response.output_item.done", output_index=index, item=item)


def _finished_response(request: ResponsesRequest, reply: Reply, output: list[dict[str, Any]]) -> dict[str, Any]:
    usage, is_cut = reply.usage, reply.message.finish_reason == "length"
    cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
    return _response(
        request,
        reply.plan,
        "incomplete" if is_cut else "completed",
        output=output,
        incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
        usage={
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        },
        tts=reply.tts,
    )


def _response(request: ResponsesRequest, plan: Plan, status: str, **fields: Any) -> dict[str, Any]:
    """Return the Response object, with the fields that echo the request."""
    extra = request.model_extra or {}
    effort = None if request.reasoning is None else request.reasoning.effort
    return {
        "id": plan.request_id,
        "object": "response",
        "created_at": plan.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": extra.get("metadata") or {},
        "model": plan.prompt.model,
        "output": [],
        "parallel_tool_calls": extra.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"}, **{k: v for k, v in (request.text or {}).items() if v is not None}},
        "tool_choice": extra.get("tool_choice") or "auto",
        "tools": extra.get("tools") or [],
        "top_p": request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": extra.get("user"),
        **fields,
    }


def _reasoning_item(plan: Plan, summary: str, reasoning: str) -> dict[str, Any]:
    return {
        "id": _id(plan, "rs"),
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": summary}] if summary else [],
        "content": [{"type": "reasoning_text", "text": reasoning}] if reasoning else [],
        "encrypted_content": None,
        "status": "completed",
    }


def _output_items(plan: Plan, message: Message) -> list[dict[str, Any]]:
    """Return the items of a message: its text, unless it has none, and each call."""
    calls = [_call_item(plan, message, number) for number in range(len(message.tool_calls))]
    return [*([_message_item(plan, message)] if message.content else []), *calls]


def _call_item(plan: Plan, message: Message, number: int) -> dict[str, Any]:
    call = message.tool_calls[number]
    return {
        "id": f"{_id(plan, 'fc')}_{number}",
        "type": "function_call",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
        "status": "incomplete" if message.finish_reason == "length" else "completed",
    }


def _message_item(plan: Plan, message: Message) -> dict[str, Any]:
    return {
        "id": _id(plan, "msg"),
        "type": "message",
        "role": "assistant",
        "status": "incomplete" if message.finish_reason == "length" else "completed",
        "content": [{"type": "output_text", "text": message.content, "annotations": [], "logprobs": []}],
    }


def _id(plan: Plan, kind: str) -> str:
    return f"{kind}_{plan.request_id.removeprefix('resp_')}"
