"""A fake vLLM for agents: it calls their tool, reads the tool's result, and fills the schemas they send."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from aiohttp import web

from tests.chat_fake import ChatVLLM, ScriptedReply

DOCUMENTS: Final = (
    '{"name":"Rome","people":3}',
    '{"name":"Oslo","people":2}',
    '{"name":"Rome","people":2}',
    "oops",
)
"""Replies to a schema. By the vote on fields, Rome has 2 people."""
RESULT: Final = "21 degrees"
"""Result of the tool."""
THOUGHT: Final = "The tool knows."
CALLS: Final = (
    ScriptedReply("I cannot."),
    ScriptedReply(calls=[("id-1", "weather", '{"city":"Oslo"}')]),
    ScriptedReply(calls=[("id-2", "weather", '{"city": "Rome"}')], thought=THOUGHT),
    ScriptedReply(calls=[("id-3", "weather", '{"city":"Rome","unit":"C"}')]),
)
"""Replies to a question. By the vote on calls, id-2 wins."""
ANSWERS: Final = (
    ScriptedReply("It is \\boxed{7} degrees."),
    ScriptedReply("It is \\boxed{7.0}."),
    ScriptedReply("It is \\boxed{8}."),
    ScriptedReply("It is \\boxed{7} degrees, I think."),
)
"""Replies to a tool's result."""


class AgentVLLM(ChatVLLM):
    """Answers each branch of a request by what the request asks for: a document, a final answer or a call."""

    def __init__(self) -> None:
        super().__init__(CALLS)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], reply: ScriptedReply, fault: str
    ) -> web.StreamResponse:
        at = self.replies.index(reply)
        scripted = replies_to(body)
        return await super()._stream(request, body, scripted[at % len(scripted)], fault)


def replies_to(body: dict[str, Any]) -> Sequence[ScriptedReply]:
    """Return the replies to a request, by branch."""
    if body.get("response_format"):
        return [ScriptedReply(document) for document in DOCUMENTS]
    if body["messages"][-1]["role"] == "tool":
        assert RESULT in json.dumps(body["messages"][-1])
        return ANSWERS
    names = [tool["function"]["name"] for tool in body["tools"]]
    if names == ["weather"]:
        return CALLS
    return [ScriptedReply(calls=[(f"id-{at}", names[0], text)]) for at, text in enumerate(DOCUMENTS)]
