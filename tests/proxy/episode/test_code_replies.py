"""Replies with functions, compared by what these return, through a running proxy with real sealed processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from controllers.errors import SandboxUnavailable
from proxy.environment.selection import code_runner
from tests.chat_fake import SEED, Held, last_text
from tests.proxy.conftest import Proxy
from tests.proxy.episode.test_judged_replies import says, shown
from tests.proxy.episode.test_whole_replies import WEATHER, fake, served, text

pytestmark = pytest.mark.process

CODE = {"answer": "code", "controller": "self_consistency@5"}
ADD = "Write add(a, b).\n>>> add(1, 2)\n>>> add(2, 2)"
ADD_STATED = f"{ADD}\n4\n>>> add(1, 2)\n3"


def function(body: str, name: str = "add") -> str:
    return f"Sure!\n```python\ndef {name}(a, b):\n    {body}\n```\nDone."


RIGHT = [function("return a + b"), function("total = a\n    total += b\n    return total")]
TIMES, MINUS, POWER = (function(f"return a {operator} b") for operator in ("*", "-", "**"))


async def ask(proxy: Proxy, question: str = ADD, **fields: Any) -> tuple[int, Any, Any]:
    messages = [{"role": "user", "content": question}]
    return await proxy.ask("0.5", **{"seed": SEED, "tts": CODE, "messages": messages, **fields})


async def replies_to(contents: Sequence[str], question: str = ADD, judge: str = "", **fields: Any) -> tuple[Any, Any]:
    """Return the reply of a proxy whose upstream answers with `contents`, and the calls of its judge."""
    async with served([text(each) for each in contents]) as proxy:
        fake(proxy).judge = says(judge)
        status, _, reply = await ask(proxy, question, **fields)
        assert status == 200, reply
        return reply, fake(proxy).judge_requests


def content(reply: Any) -> str:
    written: str = reply["choices"][0]["message"]["content"]
    return written


async def test_the_largest_class_of_equal_behaviour_wins_and_its_shortest_reply_is_sent() -> None:
    reply, judged = await replies_to([TIMES, RIGHT[1], MINUS, RIGHT[0], POWER])
    assert content(reply) == RIGHT[0]
    tts = reply["tts"]
    assert (tts["selected_by"], tts["answer_kind"], tts["answer"], judged) == ("vote", "code", "3, 4", [])
    assert tts["code"] == {"inputs": 2, "expected": 0, "ran": 5, "satisfied": 0}
    assert tts["votes"] == {"2, 4": 1, "3, 4": 2, "-1, 0": 1, "1, 4": 1}
    assert (tts["agreement"], tts["agreed"]) == (0.4, True)
    assert tts["tokens"]["winner"] + tts["tokens"]["agreeing"] == len(RIGHT[0]) + len(RIGHT[1]) + 2
    assert "judge" not in tts


async def test_a_reply_that_returns_the_stated_outputs_beats_more_replies_that_do_not() -> None:
    reply, _ = await replies_to([TIMES, TIMES, RIGHT[0], MINUS, MINUS], ADD_STATED)
    assert content(reply) == RIGHT[0]
    assert reply["tts"]["code"] == {"inputs": 2, "expected": 2, "ran": 5, "satisfied": 2}
    assert (reply["tts"]["agreement"], reply["tts"]["selected_by"], reply["tts"]["agreed"]) == (0.2, "vote", False)


async def test_the_controller_stops_when_behaviours_agree_and_escalates_when_they_do_not() -> None:
    reply, _ = await replies_to(RIGHT, tts={"answer": "code"})
    assert (reply["tts"]["controller"], reply["tts"]["branches"]) == ("adaptive_consistency", 4)
    five = {**CODE, "controller": "self_consistency@3", "min_agreement": 0.9, "otherwise": "escalate"}
    reply, _ = await replies_to([TIMES, RIGHT[0], MINUS, *RIGHT * 8], tts=five)
    assert (reply["tts"]["escalated_beta"], reply["tts"]["branches"] > 3) == (1, True)


async def test_ties_are_decided_by_the_judge_among_one_reply_of_each_class() -> None:
    contents = [TIMES, RIGHT[1], MINUS, RIGHT[0], TIMES]
    reply, (body,) = await replies_to(contents, judge="4")
    assert set(shown(last_text(body)).values()) == {TIMES, RIGHT[0]}
    assert content(reply) == RIGHT[0]
    tts = reply["tts"]
    assert (tts["selected_by"], tts["compared"], tts["answer"], tts["agreement"]) == ("judge", 2, "3, 4", 0.4)
    reply, _ = await replies_to(contents, judge="none")
    assert (content(reply), reply["tts"]["selected_by"]) == (TIMES, "overlap")


HOSTILE = [
    function("while True: pass"),
    function("kept = []\n    while True: kept.append('x' * 10**6)"),
    "```python\nimport os\ndef add(a, b): return a + b\n```",
    function("print(a)\n    return a - b"),
    function("raise ValueError"),
    "I would rather not.",
    "```python\ndef add(a, b)\n```",
    "```js\nadd = (a, b) => a + b\n```",
]


async def test_code_that_loops_eats_memory_imports_prints_or_raises_does_not_vote() -> None:
    tts = {**CODE, "controller": "self_consistency@10"}
    reply, judged = await replies_to([*HOSTILE, *RIGHT], tts=tts)
    assert content(reply) == RIGHT[0]
    assert (reply["tts"]["code"]["ran"], reply["tts"]["votes"], judged) == (2, {"3, 4": 2}, [])


@pytest.mark.parametrize(
    ("contents", "question"),
    [
        ([*HOSTILE[2:], RIGHT[0]], ADD),  # only one can be run
        ([TIMES, RIGHT[0], MINUS], "Write add(a, b)."),  # no input is known
    ],
)
async def test_if_fewer_than_two_replies_can_be_run_the_model_compares_them(contents: list[str], question: str) -> None:
    tts = {**CODE, "controller": f"self_consistency@{len(contents)}"}
    reply, (body,) = await replies_to(contents, question, judge="2", tts=tts)
    assert content(reply) == contents[1]
    assert list(shown(last_text(body)).values()) == contents
    assert (reply["tts"]["selected_by"], reply["tts"]["answer"]) == ("judge", None)
    assert ("code" in reply["tts"]) is (question == ADD)


async def test_inputs_that_the_request_gives_are_used_with_and_without_a_name() -> None:
    question = "Write a function that adds."
    for options in ({"inputs": [[1, 2], [2, 2]]}, {"function": "add", "inputs": [[1, 2], ["a", "b"]]}):
        reply, _ = await replies_to([TIMES, *RIGHT, MINUS, POWER], question, tts={**CODE, "code": options})
        assert (content(reply), reply["tts"]["code"]["inputs"]) == (RIGHT[0], 2)
    reply, _ = await replies_to([TIMES, *RIGHT], ADD, tts={**CODE, "code": {"inputs": [[1, 2], [9, 9]]}})
    assert reply["tts"]["code"]["inputs"] == 3


async def test_code_is_streamed_and_billed_like_other_replies() -> None:
    async with served([text(each) for each in [*RIGHT, TIMES]]) as proxy:
        stream = await proxy.openai.chat.completions.create(
            model="fake-model",
            messages=[{"role": "user", "content": ADD}],
            seed=SEED,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"tts": {**CODE, "beta": 0.5}},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == RIGHT[0]
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == proxy.backend.generated


@pytest.mark.slow
async def test_after_the_deadline_no_code_is_run() -> None:
    async with served([text(RIGHT[0]), text(TIMES), text("x" * 300)]) as proxy:
        fake(proxy).held = Held(150)
        tts = {**CODE, "controller": "self_consistency@3", "deadline_s": 3}
        _, _, reply = await ask(proxy, tts=tts)
        assert reply["tts"]["stop"] == "deadline"
        assert reply["tts"]["judge"] == "skipped"
        async with asyncio.timeout(5):
            await proxy.backend.idle.wait()


async def test_without_a_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream may answer with any code, so that permission for controllers without a sandbox does not count."""

    class NoSpawner:
        def spawn(self, *_: object) -> None:
            raise SandboxUnavailable("no")

    monkeypatch.setattr(code_runner, "spawner", NoSpawner)
    async with served([text(TIMES), text(RIGHT[0])], allow_unsandboxed=True) as proxy:
        fake(proxy).judge = says("2")
        _, _, reply = await ask(proxy, tts={**CODE, "controller": "self_consistency@2"})
        assert (content(reply), reply["tts"]["selected_by"], reply["tts"]["code"]["ran"]) == (RIGHT[0], "judge", 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tts": {"answer": "select", "code": {}}}, "tts.code"),
        ({"tts": {"answer": "code:lines", "code": {"inputs": [[1]]}}}, "tts.code"),
        ({"tts": {"code": {}}}, "tts.code"),
        ({"tts": {**CODE, "code": {"inputs": 5}}}, "tts.code.inputs"),
        ({"tts": {**CODE, "code": {"inputs": [5]}}}, "tts.code.inputs.0"),
        ({"tts": {**CODE, "code": {"inputs": [[1]] * 33}}}, "tts.code.inputs"),
        ({"tts": {**CODE, "code": {"inputs": [["x" * 30_000]]}}}, "tts.code.inputs"),
        ({"tts": {**CODE, "code": {"function": "a b"}}}, "tts.code.function"),
        ({"tts": {**CODE, "code": {"name": "f"}}}, "tts.code.name"),
        ({"tts": CODE, "tools": [WEATHER]}, "tts.answer"),
        ({"tts": CODE, "response_format": {"type": "json_object"}}, "tts.answer"),
    ],
)
async def test_bad_input_names_its_field(fields: dict[str, Any], param: str) -> None:
    async with served([text("hi")]) as proxy:
        status, _, reply = await ask(proxy, **fields)
        assert (status, reply["error"]["param"]) == (400, param), reply
        assert proxy.backend.requests == []
