"""A pre-trained model behind the proxy: billing, voting and greedy decoding. `make soak` runs these tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.real_model import study
from tests.real_model.asking import RealModel, draw_sums, serving
from tests.real_model.model import is_built

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not is_built(), reason="the real model is not built here; `make real-model` builds it"),
    pytest.mark.soak,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

SUMS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model() -> AsyncIterator[RealModel]:
    async with serving() as served:
        yield served


@pytest.mark.parametrize("controller", ["cmc", "parallel_probe", "self_consistency"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}], ids=["default temperature", "temperature 0"])
async def test_sums_are_voted_on_and_billed_within_the_bound(
    model: RealModel, controller: str, sampling: dict[str, float]
) -> None:
    turns, sums = draw_sums(SUMS)
    row = await study.measure(model, "", sums, turns, 0.6, tts={"controller": controller}, **sampling)
    assert row.not_votable == 0
    assert row.is_within_bound, (row.billed, row.generated, row.unseen)
    assert min(reply.branches for reply in row.replies) > 1


async def test_at_temperature_0_and_beta_0_the_reply_equals_greedy_decoding(model: RealModel) -> None:
    turns, sums = draw_sums(SUMS)
    greedy = await study.measure(model, "", sums, turns, None, temperature=0)
    single = await study.measure(model, "", sums, turns, 0, tts={"controller": "single"}, temperature=0)
    assert [reply.text for reply in single.replies] == [reply.text for reply in greedy.replies]


async def test_most_prose_is_not_voted_on_and_most_tasks_are(model: RealModel) -> None:
    apart = await study.tell_apart(model, 0.3, "cmc")
    assert apart.voted_prose <= len(apart.prose) // 4
    assert apart.missed_tasks <= len(apart.tasks) // 2  # this model ends some replies early, without an answer
