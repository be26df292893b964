"""Signals of live branches and probes: aligned with the tokens, however many requests generated them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from controllers import TO_END, Advanced, Limits, Probed, State, advance, branch, probe, run_episode
from controllers.signals import ALL_SIGNALS, NO_SIGNALS, Signal, answer_confidence
from proxy.environment.branch_signals import fact_signals, probe_confidence
from proxy.environment.live_environment import LiveEnvironment
from proxy.errors import UpstreamError
from proxy.probe_templates import TEMPLATES, Family
from proxy.types import Call, EnvironmentLimits, LiveBranch, Output, Prompt
from proxy.upstream.client import UpstreamClient
from tests.fakes import (
    ASSISTANT,
    MODEL,
    Chain,
    FakeVLLM,
    Scripted,
    ScriptedEnvironment,
    chain,
    log_probability,
)

INTERVAL = 40
PROMPT = [ord(char) for char in f"hi{ASSISTANT}"]
CHAINS = [
    chain("7", 130, ["1", "7"], mark="a"),
    chain("9", 70, ["9"], mark="b"),
    chain("7", 300, ["2", "3", "7"], mark="c"),
    chain("8", 39, ["8"], mark="d"),
    chain("7", 80, ["7"], mark="e"),
]
EPISODES = {
    "one interval a round": [[branch()] * 5, *[[advance(i) for i in (0, 2)]] * 3, *[[advance(2)]] * 4],
    "several intervals": [[branch(2)] * 5, [advance(0, 2), advance(2, 3)], [advance(2, TO_END)]],
    "to the end": [[branch(TO_END)] * 5],
    "several in one round": [[branch()] * 5, [advance(0), advance(0, 2), advance(2, TO_END)]],
}


@asynccontextmanager
async def live(
    backend: FakeVLLM, signals: frozenset[Signal] = ALL_SIGNALS, stop: Sequence[str] = (), **options: Any
) -> AsyncIterator[LiveEnvironment]:
    async with backend.serve(), aiohttp.ClientSession() as session:
        prompt, limits = Prompt(MODEL, PROMPT, "", {}, stop=stop), EnvironmentLimits(INTERVAL, 1000, 8)
        yield LiveEnvironment(UpstreamClient(backend.url, session), prompt, limits, signals=signals, **options)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("keeps_all_branches", [False, True])
@pytest.mark.parametrize("rounds", EPISODES.values(), ids=EPISODES)
async def test_signals_equal_those_of_the_tokens_whatever_requests_generate_them(
    rounds: list[list[Any]], keeps_all_branches: bool, seed: int | None
) -> None:
    scripted = ScriptedEnvironment(CHAINS, INTERVAL, signals=ALL_SIGNALS)
    async with live(FakeVLLM(CHAINS, INTERVAL), keeps_all_branches=keeps_all_branches) as environment:
        environment._generator.prompt = environment.prompt = environment.prompt._replace(seed=seed)
        for actions in rounds:
            facts = await environment.execute(actions)
            assert facts == await scripted.execute(actions)
            assert all(isinstance(fact, Advanced) and fact.confidence is not None for fact in facts)
        for script, known in zip(CHAINS, environment.branches, strict=True):
            assert list(known.log_probabilities) == script.log_probabilities[: len(known.ids)]


async def test_a_fact_of_many_intervals_says_as_much_as_facts_of_one_each() -> None:
    confidences = []
    for step in (1, 3, TO_END):
        state = State(Limits(INTERVAL))
        async with live(FakeVLLM([CHAINS[0]], INTERVAL)) as environment:
            actions = [branch(step)]
            while actions:
                state.apply(actions, await environment.execute(actions))
                actions = [advance(index, step) for index in state.active]
        (known,) = state.branches
        assert known.finished
        assert known.log_probability is not None
        confidences.append((known.log_probability / known.tokens, known.lowest))
    assert {lowest for _, lowest in confidences} == {confidences[0][1]}
    assert [mean for mean, _ in confidences] == pytest.approx([confidences[0][0]] * 3, abs=0.01)  # rounded to per mille


@pytest.mark.parametrize("late", [False, True])
async def test_the_confidence_of_a_probe_is_that_of_its_answer_without_the_brace(late: bool) -> None:
    script = chain("7", 130, ["12", ""], mark="a")
    suffix = TEMPLATES[Family.QWEN3].suffix("", script.text[:INTERVAL])
    first = len(script.text[:INTERVAL] + suffix)
    expected = answer_confidence([log_probability(ord(char), first + at) for at, char in enumerate("12")])
    async with live(FakeVLLM([script], INTERVAL)) as environment:
        await environment.execute([branch()])
        if late:
            await environment.execute([advance(0)])
            facts: Sequence[Any] = await environment.probe_at([(0, 1), (0, 2)])
            assert facts[1] == Probed(0, None, facts[1].tokens, None)  # no answer, so no confidence
        else:
            facts = await environment.execute([probe(0)])
        assert facts[0] == Probed(0, 0, len(suffix) + len("12}") + 1, expected)
        assert expected is not None


@pytest.mark.parametrize(
    ("texts", "length"),
    [
        (["4", "}", "<end>"], 1),
        (["1", "7", "}.", "<end>"], 2),
        (["17}"], 1),
        (["1", "7}\n"], 2),
        (["\\frac", "{", "1}{", "2", "}", "}"], 5),
        (["4", " }"], 1),
        (["}"], 0),
        (["1", "7"], None),
        ([], None),
        (["token_id:5", "token_id:6"], None),
    ],
)
def test_the_answer_of_a_probe_ends_at_its_closing_brace(texts: list[str], length: int | None) -> None:
    output = Output(ids=[*range(len(texts))], token_texts=texts)
    output.log_probabilities.extend(-0.1 * (at + 1) for at in range(len(texts)))
    expected = answer_confidence(output.log_probabilities[:length]) if length else None
    assert probe_confidence(output, TEMPLATES[Family.QWEN3]) == expected


@pytest.mark.parametrize("signals", [NO_SIGNALS, {Signal.INTERVALS}, {Signal.PROBES}, ALL_SIGNALS])
async def test_only_the_needed_log_probabilities_are_asked_for(signals: set[Signal]) -> None:
    async with live(backend := FakeVLLM(CHAINS, INTERVAL), frozenset(signals)) as environment:
        facts = await environment.execute([branch(), branch(), probe(0)])
        branches, probes = (
            [body for body in backend.requests if ("stop" in body) is has_stop] for has_stop in (False, True)
        )
        assert [body.get("logprobs") for body in branches] == [0 if Signal.INTERVALS in signals else None]
        assert [body.get("logprobs") for body in probes] == [0 if Signal.PROBES in signals else None]
        assert [isinstance(fact, Probed) for fact in facts if fact.confidence is not None] == [
            *([False] * 2 if Signal.INTERVALS in signals else []),
            *([True] if Signal.PROBES in signals else []),
        ]
        for known in environment.branches:
            assert len(known.log_probabilities) == (len(known.ids) if Signal.INTERVALS in signals else 0)


async def test_signals_cost_no_tokens() -> None:
    spent = []
    for signals in (NO_SIGNALS, ALL_SIGNALS):
        async with live(FakeVLLM(CHAINS, INTERVAL), signals) as environment:
            state = State(Limits(INTERVAL))
            await run_episode(Scripted([branch()] * 5, [probe(0), advance(0, TO_END)]), environment, state)
            spent.append((state.spent, environment.meter.billed, environment.meter.requests, state.answer))
    assert spent[0] == spent[1]


@pytest.mark.parametrize("fault", ["no_logprobs", "unsure"])
async def test_a_server_without_log_probabilities_leaves_signals_unknown(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeVLLM(CHAINS, INTERVAL)
    backend.fault = fault
    async with live(backend) as environment:
        facts = [*await environment.execute([branch(), branch(), probe(0)]), *await environment.execute([advance(0)])]
        assert [(fact.label, fact.confidence) for fact in facts if isinstance(fact, Probed)] == [(0, None)]
        assert [(fact.tokens, fact.confidence, fact.lowest) for fact in facts if isinstance(fact, Advanced)] == [
            (INTERVAL, None, None)
        ] * 3
        assert all(math.isnan(value) for known in environment.branches for value in known.log_probabilities)
        assert [len(known.log_probabilities) for known in environment.branches] == [2 * INTERVAL, INTERVAL]
        assert environment.interval_signals(0, 2 * INTERVAL) == [(None, None)] * 2
    asked = ["logprobs" in body for body in backend.requests]
    assert asked == ([True, False, False, False] if fault == "no_logprobs" else [True] * 3)  # it is asked only once
    messages = [record.message for record in caplog.records if "log-probabilities" in record.message]
    assert len(messages) == 1


async def test_a_refusal_of_something_else_is_an_error() -> None:
    backend = FakeVLLM(CHAINS, INTERVAL)
    backend.fault = "refuse"
    async with live(backend) as environment:
        with pytest.raises(Exception, match="no such thing"):
            await environment.execute([branch()])
    assert len(backend.requests) == 1


async def test_the_tokens_of_an_aborted_call_keep_their_log_probabilities() -> None:
    backend = FakeVLLM(CHAINS, INTERVAL)
    backend.fault, backend.fault_after = "cut", 2
    async with live(backend, keeps_all_branches=True) as environment:
        await environment.execute([branch()])
        await environment.execute([advance(0)])  # afterwards the text of all ids is known, so that none is dropped
        with pytest.raises(UpstreamError):
            await environment.execute([advance(0)])
        environment.salvage()
        (known,) = environment.branches
        assert len(known.ids) == 2 * INTERVAL + 1
        assert list(known.log_probabilities) == CHAINS[0].log_probabilities[: 2 * INTERVAL + 1]


async def test_the_tokens_up_to_a_stop_string_have_signals() -> None:
    script = Chain("<think>" + "a" * 50 + "</think>\n\nSo it is HALT and more")
    async with live(FakeVLLM([script], INTERVAL), stop=["HALT"], keeps_all_branches=True) as environment:
        (fact,) = await environment.execute([branch(TO_END)])
        (known,) = environment.branches
        assert known.ended_by_stop_string
        assert isinstance(fact, Advanced)
        assert fact.tokens == len(known.ids) == len(known.log_probabilities)
        assert fact.confidence is not None
        assert list(known.log_probabilities) == script.log_probabilities[: len(known.ids)]


def test_signals_of_tokens_that_do_not_begin_an_interval_are_unknown() -> None:
    known = LiveBranch(ids=[1] * 50)
    known.log_probabilities.extend([-0.5] * 50)
    assert fact_signals(known, 20, 0, 50) == (607, 607)
    assert fact_signals(known, 20, 10, 50) == fact_signals(known, 20, 40, 40) == (None, None)


def test_a_token_without_log_probability_makes_only_its_interval_unknown() -> None:
    known = LiveBranch(ids=[1] * 50)
    known.log_probabilities.extend([-0.5] * 30 + [math.nan] + [-0.5] * 19)
    assert fact_signals(known, 20, 0, 20) == fact_signals(known, 20, 40, 50) == (607, 607)
    assert fact_signals(known, 20, 20, 40) == fact_signals(known, 20, 0, 50) == (None, None)


def test_a_call_without_tokens_lacks_no_log_probabilities() -> None:
    assert not Call([[1]], 5, {}, needs_log_probabilities=True).lacks_log_probabilities
