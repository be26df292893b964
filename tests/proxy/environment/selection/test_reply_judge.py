"""The judge against an environment without an upstream: what fits into its prompt, and what its outcome is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.environment.selection.judge_prompt import ReplyCandidate
from proxy.environment.selection.reply_judge import JudgeOutcome, ReplyJudgement, judge_replies
from proxy.errors import UpstreamError
from proxy.reply_request import JudgeLimits
from proxy.upstream.chat_stream import ChatOutput

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stop": ["x"], "tools": [1]}
SELECT, WRITE = JudgeLimits(False, 50, None), JudgeLimits(True, 50, None)


class Judge:
    """Answers with a text. A character is a token. It hangs without an answer, and fails with an error for one."""

    def __init__(self, answer: str | UpstreamError | None, room: int | None = None, context: int | None = None) -> None:
        self.answer, self.judge_room, self.judge_context = answer, room, context
        self.asked: list[tuple[Mapping[str, Any], int, int]] = []

    async def count_tokens(self, text: str) -> int:
        return len(text)

    async def ask_judge(self, body: Mapping[str, Any], max_tokens: int, own_tokens: int) -> ChatOutput:
        self.asked.append((body, max_tokens, own_tokens))
        if isinstance(self.answer, UpstreamError):
            raise self.answer
        if self.answer is None:
            await asyncio.Event().wait()
        return ChatOutput(contents=[self.answer or ""], finish="stop")


def candidates(*lengths: int) -> Sequence[ReplyCandidate]:
    return [ReplyCandidate(branch, "x" * length) for branch, length in enumerate(lengths)]


async def judged(judge: Judge, limits: JudgeLimits = SELECT, remaining_s: float | None = None) -> ReplyJudgement:
    return await judge_replies(judge, BODY, limits, candidates(30, 10, 20), remaining_s)


async def test_it_names_a_reply_or_writes_one() -> None:
    assert await judged(Judge("2")) == ReplyJudgement(JudgeOutcome.CHOSEN, 3, 1)
    judgement = await judged(Judge("2"), WRITE)
    assert (judgement.outcome, judgement.branch) == (JudgeOutcome.CHOSEN, None)
    assert judgement.written is not None


async def test_the_call_that_names_a_reply_has_no_other_fields_of_the_request() -> None:
    judge = Judge("2")
    await judged(judge)
    await judged(judge, WRITE)
    assert judge.asked[0][0].keys() == {
        *("model", "messages", "temperature", "chat_template_kwargs", "structured_outputs"),
    }
    assert judge.asked[1][0].keys() == BODY.keys()


@pytest.mark.parametrize("seconds", [-1, 0, 0.01])
async def test_a_deadline_ends_it(seconds: float) -> None:
    assert (await judged(Judge(None), remaining_s=seconds)).outcome is JudgeOutcome.LATE


async def test_an_error_of_the_upstream_is_an_outcome() -> None:
    assert await judged(Judge(UpstreamError("no"))) == ReplyJudgement(JudgeOutcome.FAILED, 3)


@given(
    room=st.none() | st.integers(-10, 1500),
    context=st.none() | st.integers(-10, 1500),
    answer=st.integers(1, 500),
    lengths=st.lists(st.integers(0, 400), min_size=2, max_size=8),
    writes=st.booleans(),
)
def test_prompt_and_answer_fit_and_no_reply_is_left_out_that_is_shorter_than_another(
    room: int | None, context: int | None, answer: int, lengths: list[int], writes: bool
) -> None:
    judge = Judge("1", room, context)
    judgement = asyncio.run(judge_replies(judge, BODY, JudgeLimits(writes, answer, None), candidates(*lengths), None))
    if judgement.outcome is JudgeOutcome.NO_ROOM:
        assert judge.asked == []
        return
    ((body, most, own),) = judge.asked
    text = body["messages"][-1]["content"].removeprefix("hi")
    assert own == len(text)
    assert 1 <= most <= answer
    assert all(own + most <= bound for bound in (room, context) if bound is not None)
    shown = [index for index in range(len(lengths)) if f" {index + 1}>\n" in text]
    left_out = [length for index, length in enumerate(lengths) if index not in shown]
    assert judgement.compared == len(shown) >= 2
    assert max((lengths[index] for index in shown), default=0) <= min(left_out, default=400)
