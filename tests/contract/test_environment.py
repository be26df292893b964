"""One suite for all environments: the same controller on the same chains sees the same facts and episode.

To test a new environment, add to ENVIRONMENTS a context manager that yields an environment for given chains.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controllers import (
    TO_END,
    Advanced,
    Environment,
    Limits,
    Probed,
    Round,
    State,
    Stop,
    advance,
    branch,
    probe,
    prune,
    run_episode,
)
from controllers.builtin import BUILT_IN, create
from controllers.loading import Spec
from discovery.answers import read_answer
from discovery.data.recordings import RecordedBranch, RecordedQuestion, intern_answers
from discovery.evaluation.replay import ReplayEnvironment
from proxy.environment.live_environment import LiveEnvironment
from proxy.environment.reply_environment import ReplyEnvironment
from proxy.probe_templates import LEAD, TEMPLATES, Family
from proxy.reply_request import ReplyRequest
from proxy.types import EnvironmentLimits, Model, Prompt
from proxy.upstream.client import UpstreamClient
from tests.breaking_fake import breaking_fleet
from tests.chat_fake import SEED, ChatVLLM, reply_of
from tests.fakes import LONGEST_CLOSING, MODEL, Chain, FakeVLLM, Scripted, ScriptedEnvironment, chain

INTERVAL = 40
PROBE = 12
ANSWER_TOKENS = 3  # one digit, a brace and the end token
TEMPLATE = TEMPLATES[Family.QWEN3]
PROBE_COST = len(TEMPLATE.longest_suffix) + ANSWER_TOKENS

Factory = Callable[[Sequence[Chain]], AbstractAsyncContextManager[Environment]]


@asynccontextmanager
async def scripted(chains: Sequence[Chain]) -> AsyncIterator[Environment]:
    yield ScriptedEnvironment(chains, INTERVAL, probe_cost=lambda text: len(TEMPLATE.suffix("", text)) + ANSWER_TOKENS)


@asynccontextmanager
async def live(chains: Sequence[Chain]) -> AsyncIterator[Environment]:
    async with FakeVLLM(chains, INTERVAL).serve() as backend, aiohttp.ClientSession() as session:
        engine = UpstreamClient(backend.url, session)
        ids = await engine.tokenise_chat({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
        yield LiveEnvironment(engine, Prompt(MODEL, ids, "", {}), EnvironmentLimits(INTERVAL, 10_000, PROBE))


@asynccontextmanager
async def continued(chains: Sequence[Chain]) -> AsyncIterator[Environment]:
    """Yield an environment over replicas each of whose calls breaks off, and is continued by another one."""
    async with breaking_fleet(chains, INTERVAL) as (engine, fakes):
        ids = await engine.tokenise_chat({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
        world = LiveEnvironment(engine, Prompt(MODEL, ids, "", {}), EnvironmentLimits(INTERVAL, 10_000, PROBE))
        yield world
        assert fakes[0].broken
        assert world.meter.aborted_tokens == 0  # no token was generated twice


@asynccontextmanager
async def replies(chains: Sequence[Chain]) -> AsyncIterator[Environment]:
    async with ChatVLLM([*map(reply_of, chains)]).serve() as backend, aiohttp.ClientSession() as session:
        prompt, request = Prompt(MODEL, (), "", {}, seed=SEED), ReplyRequest({"model": MODEL, "messages": []}, {})
        limits = EnvironmentLimits(INTERVAL, 10_000, 0)
        world = ReplyEnvironment(UpstreamClient(backend.url, session), Model(MODEL, 10_000), prompt, request, limits)
        try:
            yield world
        finally:
            await world.close()


@asynccontextmanager
async def replayed(chains: Sequence[Chain]) -> AsyncIterator[Environment]:
    branches = [_recorded(chain) for chain in chains]
    recorded = RecordedQuestion("hi", MODEL, "chains", INTERVAL, branches, "7")
    yield ReplayEnvironment(intern_answers(recorded), range(len(chains)))


def _recorded(chain: Chain) -> RecordedBranch:
    """Return a chain as a collector records it: probed after each interval but the last."""
    cuts = range(INTERVAL, chain.tokens, INTERVAL)
    probe_answers = [_written(LEAD + chain.probe_answer(at, INTERVAL) + "}") for at in cuts]
    costs = [len(TEMPLATE.suffix("", chain.text[:at])) + ANSWER_TOKENS for at in cuts]
    return RecordedBranch(probe_answers, chain.tokens, _written(chain.text), costs)


def _written(text: str) -> str | None:
    answer = read_answer(text)
    return None if answer is None else answer.written


PROBING: dict[str, Factory] = {"scripted": scripted, "live": live, "continued": continued, "replay": replayed}
"""Environments with probes."""
ENVIRONMENTS: dict[str, Factory] = {**PROBING, "replies": replies}

CHAINS = [
    chain("7", 130, ["1", "7"], mark="a"),
    chain("9", 70, ["9"], mark="b"),
    chain("7", 300, ["2", "3", "7"], mark="c"),
    chain("8", 39, ["8"], mark="d"),
]


@pytest.fixture(params=ENVIRONMENTS)
def environment(request: pytest.FixtureRequest) -> Factory:
    return ENVIRONMENTS[request.param]


@pytest.fixture(params=PROBING)
def probing(request: pytest.FixtureRequest) -> Factory:
    return PROBING[request.param]


async def play(factory: Factory, controller: object, chains: Sequence[Chain] = CHAINS) -> tuple[State, list[Round]]:
    rounds: list[Round] = []
    state = State(Limits(INTERVAL, has_probes=factory in PROBING.values()))
    async with factory(chains) as world:
        await run_episode(controller, world, state, lambda _, r: rounds.append(r))  # type: ignore[arg-type]
    return state, [Round(list(r.actions), list(r.facts)) for r in rounds]


async def test_opening_branches_runs_their_first_interval(environment: Factory) -> None:
    state, rounds = await play(environment, Scripted([branch(2), branch(2)], [branch(TO_END)], [branch()]))
    assert [fact for round_ in rounds for fact in round_.facts] == [
        Advanced(0, 2, 80, False),
        Advanced(1, 2, 70, True, 0),
        Advanced(2, 8, 300, True, 1),
        Advanced(3, 1, 39, True, 2),
    ]
    assert state.stop is Stop.ANSWERED
    assert state.answer == 0


async def test_facts_are_in_action_order_and_labels_in_order_of_first_reveal(environment: Factory) -> None:
    _, rounds = await play(
        environment, Scripted([branch(), branch(), branch()], [advance(2, 9), advance(1), advance(0)])
    )
    assert rounds[1].facts == [Advanced(2, 7, 260, True, 0), Advanced(1, 1, 30, True, 1), Advanced(0, 1, 40, False)]


async def test_facts_of_probes_are_in_action_order_too(probing: Factory) -> None:
    _, rounds = await play(
        probing,
        Scripted([branch(), branch(), branch()], [probe(2), advance(1), probe(0)], [advance(0), probe(0), advance(2)]),
    )
    assert rounds[1].facts == [
        Probed(2, 0, PROBE_COST),
        Advanced(1, 1, 30, True, 1),
        Probed(0, 2, PROBE_COST),
    ]
    assert rounds[2].facts == [
        Advanced(0, 1, 40, False),
        Probed(0, 3, PROBE_COST),
        Advanced(2, 1, 40, False),
    ]


async def test_advances_of_one_branch_run_in_list_order(environment: Factory) -> None:
    _, rounds = await play(environment, Scripted([branch(), advance(0, 2), advance(0)]))
    assert [fact for round_ in rounds for fact in round_.facts] == [
        Advanced(0, 1, 40, False),
        Advanced(0, 2, 80, False),
        Advanced(0, 1, 10, True, 0),
    ]


async def test_actions_of_one_branch_run_in_list_order(probing: Factory) -> None:
    _, rounds = await play(
        probing, Scripted([branch(), probe(0), advance(0), probe(0), advance(0), probe(0), advance(0)])
    )
    in_answer = PROBE_COST - len(LONGEST_CLOSING) + len("\n\n")  # the reasoning is closed by then
    assert rounds[0].facts == [
        Advanced(0, 1, 40, False),
        Probed(0, 0, PROBE_COST),
        Advanced(0, 1, 40, False),
        Probed(0, 1, PROBE_COST),
        Advanced(0, 1, 40, False),
        Probed(0, 1, in_answer),
        Advanced(0, 1, 10, True, 1),
    ]


async def test_an_advance_of_a_finished_branch_costs_nothing(environment: Factory) -> None:
    _, rounds = await play(environment, Scripted([branch(4), advance(0)]))
    assert rounds[0].facts == [Advanced(0, 4, 130, True, 0), Advanced(0, 0, 0, True, 0)]


async def test_actions_on_a_finished_branch_cost_nothing(probing: Factory) -> None:
    _, rounds = await play(probing, Scripted([branch(4), advance(0), probe(0)]))
    assert rounds[0].facts == [Advanced(0, 4, 130, True, 0), Advanced(0, 0, 0, True, 0), Probed(0, 0, 0)]


async def test_a_prune_yields_no_fact(environment: Factory) -> None:
    _, rounds = await play(environment, Scripted([branch(), branch()], [prune(0), advance(1)]))
    assert rounds[1].facts == [Advanced(1, 1, 30, True, 0)]


def many_chains(seed: int) -> list[Chain]:
    lengths = [60 + (seed * 31 + i * 47) % 240 for i in range(64)]
    answers = ["7" if (seed + i) % 3 else "8" for i in range(64)]
    return [
        chain(answer, length, ["?", answer], mark=chr(ord("0") + i))
        for i, (answer, length) in enumerate(zip(answers, lengths, strict=True))
    ]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(BUILT_IN)), beta=st.sampled_from([0.0, 0.2, 0.6]), seed=st.integers(0, 99))
async def test_every_controller_plays_the_same_episode_in_every_environment(name: str, beta: float, seed: int) -> None:
    environments = (PROBING if Spec(name).needs_probes else ENVIRONMENTS).values()
    episodes = [await play(factory, create(name, beta), many_chains(seed)) for factory in environments]
    first, first_rounds = episodes[0]
    for state, rounds in episodes[1:]:
        assert rounds == first_rounds
        assert (state.answer, state.spent, state.stop) == (first.answer, first.spent, first.stop)
