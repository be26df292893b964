"""Whole replies as branches of an environment: pruned first branches, and replies that the upstream ends early."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp

from controllers import Advanced, branch, prune
from proxy.environment.reply_environment import ReplyEnvironment
from proxy.reply_request import ReplyRequest
from proxy.types import EnvironmentLimits, Model, Prompt
from proxy.upstream.client import UpstreamClient
from tests.chat_fake import SEED, ChatVLLM, Held, ScriptedReply
from tests.fakes import MODEL

INTERVAL = 10


@asynccontextmanager
async def opened(replies: Sequence[ScriptedReply]) -> AsyncIterator[tuple[ReplyEnvironment, ChatVLLM]]:
    async with ChatVLLM(replies).serve() as backend, aiohttp.ClientSession() as session:
        prompt, request = Prompt(MODEL, (), "", {}, seed=SEED), ReplyRequest({"model": MODEL, "messages": []}, {})
        limits = EnvironmentLimits(INTERVAL, 1000, 0)
        assert isinstance(backend, ChatVLLM)
        world = ReplyEnvironment(UpstreamClient(backend.url, session), Model(MODEL, 10_000), prompt, request, limits)
        try:
            yield world, backend
        finally:
            await world.close()


async def test_branches_are_opened_after_the_first_was_pruned() -> None:
    async with opened([ScriptedReply("x" * 50), ScriptedReply("\\boxed{7}")]) as (world, backend):
        backend.held = Held(INTERVAL + 1)
        await world.execute([branch()])
        await world.execute([prune(0)])
        backend.held = None
        (fact,) = await world.execute([branch(5)])
        assert isinstance(fact, Advanced)
        assert (fact.finished, fact.label) == (True, 0)


async def test_a_reply_that_was_stopped_for_its_repetitions_does_not_vote() -> None:
    async with opened([ScriptedReply("\\boxed{7} \\boxed{7}", finish="repetition"), ScriptedReply("\\boxed{8}")]) as (
        world,
        _,
    ):
        facts = await world.execute([branch(5)])
        assert [fact.label for fact in facts] == [None]
        assert world.branches[0].output.finish_reason == "repetition"


async def test_a_branch_that_its_own_round_prunes_is_advanced_first() -> None:
    async with opened([ScriptedReply("\\boxed{7}"), ScriptedReply("x" * 50)]) as (world, _):
        kept, pruned = await world.execute([branch(), branch(), prune(1)])
        assert isinstance(kept, Advanced)
        assert (kept.branch, kept.tokens, kept.finished, kept.label) == (0, INTERVAL, True, 0)
        assert isinstance(pruned, Advanced)
        assert (pruned.branch, pruned.tokens, pruned.finished) == (1, INTERVAL, False)
