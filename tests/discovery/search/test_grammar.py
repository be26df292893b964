"""The grammar: every controller it can emit is valid, and proposals depend only on the context."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from controllers import State, Stop, run_episode, run_sync
from controllers.advice import advise
from controllers.episode import Factory
from controllers.loading import LARGEST, Spec, load
from controllers.signals import Signal
from discovery.data.recordings import intern_answers
from discovery.evaluation.replay_jobs import Job, ReplayRules, Sealing, run_job
from discovery.search.explorers import Candidate, Cost, ExplorerContext, ScoredCandidate
from discovery.search.explorers.classics import CLASSICS
from discovery.search.explorers.controller_writer import emit
from discovery.search.explorers.genome import PARTS, Genome, Knob, genome_of, knobs, signals_of, space
from discovery.search.explorers.grammar import REFINED_EVERY, Grammar
from tests.controllers.signalled import SignalledEnvironment
from tests.controllers.test_baselines import INTERVAL, crowd
from tests.discovery.evaluation.test_evaluate import CELL, question
from tests.discovery.search.plain_policy import PlainPolicy
from tests.fakes import Chain, ScriptedEnvironment, chain, episode

COMBINATIONS = [dict(zip(PARTS, names, strict=True)) for names in itertools.product(*PARTS.values())]
SOME = random.Random(0).sample(COMBINATIONS, 200)
PAIRS = [
    {first: one, second: other}
    for first, second in itertools.combinations(PARTS, 2)
    for one, other in itertools.product(PARTS[first], PARTS[second])
]
"""Every pair of components; the other parts have their first component."""
BETAS = [at / 8 for at in range(9)]


def numbered(parts: dict[str, str], seed: int) -> dict[str, Any]:
    """Return a genome of these components with random numbers in their bounds, a third of them at a bound."""
    rng, genome = random.Random(seed), dict[str, Any](genome_of(parts))
    for name, kind in space(genome).items():
        if isinstance(kind, FloatDistribution):
            genome[name] = (
                rng.choice([kind.low, kind.high]) if rng.random() < 1 / 3 else rng.uniform(kind.low, kind.high)
            )
    return genome


GENOMES = st.builds(numbered, st.sampled_from(COMBINATIONS), st.integers(0, 10_000))


@cache
def made(source: str) -> Factory:
    return load(source, "mine")


# Emitted files


def test_different_components_give_different_files() -> None:
    genomes = [genome_of(parts) for parts in PAIRS]
    structures = {tuple(genome[part] for part in PARTS) for genome in genomes}
    assert len({emit(genome) for genome in genomes}) == len(structures) > 200


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_every_pair_of_components_gives_a_valid_file(number: int) -> None:
    for seed, parts in enumerate(PAIRS[number::4]):
        check_file(numbered(parts, seed))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(genome=GENOMES)
def test_any_numbers_give_a_valid_file(genome: Genome) -> None:
    check_file(genome)


def check_file(genome: Genome) -> None:
    source = emit(genome)
    assert advise(source) == []
    assert len(source.encode()) < LARGEST / 8
    assert max(map(len, source.splitlines())) <= 120
    assert not [line for line in source.splitlines() if line != line.rstrip()]
    assert source.endswith("\n")
    assert not source.endswith("\n\n")
    for beta in (0.0, 0.5, 1.0):
        made(source)(beta)


@pytest.mark.process
def test_emitted_files_pass_the_formatter_and_linter(tmp_path: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    for number, parts in enumerate(SOME):
        (tmp_path / f"{number}.py").write_text(emit(numbered(parts, number)))
    for verb in (["format", "--check"], ["check", "--select", "E,F,I,B,UP"]):
        done = subprocess.run(
            [ruff, *verb, "--line-length", "120", "--no-cache", "--isolated", tmp_path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(genome=GENOMES)
def test_each_knob_is_monotone_in_beta_and_within_its_bounds(genome: Genome) -> None:
    controllers = [made(emit(genome))(beta) for beta in BETAS]
    for knob in knobs(genome):
        values = [getattr(controller, knob.name) for controller in controllers]
        assert values == sorted(values, reverse=knob.falls), knob.name
        assert all(isinstance(value, int) for value in values) or not knob.is_integer
        slack = 0.51 if knob.is_integer else 0.0005 * knob.high  # tolerance for rounding
        assert knob.low - slack <= values[0]
        assert values[-1] <= knob.high + slack
        assert [values[0], values[-1]] == pytest.approx(knob.span(genome)[:2], rel=0.002, abs=slack)


@settings(max_examples=200, deadline=None)
@given(share=st.tuples(st.floats(0.4, 1.0), st.floats(0.4, 1.0)))
def test_the_required_share_of_votes_never_exceeds_1(share: tuple[float, float]) -> None:
    genome = genome_of({"stop": "share"}, share=(*share, 1.0))
    assert all(made(emit(genome))(beta).share <= 1 for beta in BETAS)  # type: ignore[attr-defined]


def test_a_falling_knob_reverses_its_span() -> None:
    knob = Knob("weariness", "how soon it stops", 1, 9, falls=True)
    genome = {"weariness.lo": 2.0, "weariness.hi": 7.0, "weariness.g": 1.5}
    assert knob.span(genome) == (7.0, 2.0, 1.5)
    assert knob._replace(falls=False).span(genome) == (2.0, 7.0, 1.5)


# Behaviour of emitted controllers


def run(genome: Genome, beta: float, chains: list[Chain], **limits: int) -> State:
    environment = ScriptedEnvironment(chains, INTERVAL, probe_cost=lambda _: 3)
    state = episode(INTERVAL, **limits)
    run_sync(run_episode(made(emit(genome))(beta), environment, state))
    return state


@settings(max_examples=150, deadline=None)
@example(genome=numbered({"depth": "horizon", "pool": "all"}, 1), beta=1.0, seed=0, cap=498, width=4)
@given(
    genome=GENOMES,
    beta=st.floats(0, 1),
    seed=st.integers(0, 1000),
    cap=st.integers(INTERVAL, 4000),
    width=st.integers(1, 64),
)
def test_each_emitted_controller_ends_within_any_token_and_branch_limits(
    genome: Genome, beta: float, seed: int, cap: int, width: int
) -> None:
    limits = {"max_tokens": cap, "branch_tokens": 500, "probe_tokens": 3, "max_branches": width}
    state = run(genome, beta, crowd(seed), **limits)
    assert state.stop in (Stop.ANSWERED, Stop.MAX_TOKENS)
    assert state.spent <= cap
    assert state.width <= width


@settings(max_examples=100, deadline=None)
@given(genome=GENOMES, beta=st.floats(0, 1))
def test_each_emitted_controller_ends_without_an_answer_when_no_chain_gives_one(genome: Genome, beta: float) -> None:
    state = run(genome, beta, [Chain("<think>hm" * (i + 1)) for i in range(64)])
    assert (state.stop, state.answer) == (Stop.ANSWERED, None)


@settings(max_examples=100, deadline=None)
@given(genome=GENOMES, beta=st.floats(0, 1), seed=st.integers(0, 1000))
def test_each_emitted_controller_answers_what_all_chains_answer(genome: Genome, beta: float, seed: int) -> None:
    state = run(genome, beta, crowd(seed, right=1.0))
    assert state.stop is Stop.ANSWERED
    if genome["depth"] == "whole":  # with other depths all chains may stop before one has an answer
        assert (state.labels, state.answer) == (1, 0)


@settings(max_examples=60, deadline=None)
@given(genome=GENOMES, beta=st.floats(0, 1), seed=st.integers(0, 1000))
def test_an_emitted_controller_replays_to_the_same_episode(genome: Genome, beta: float, seed: int) -> None:
    first, second = (run(genome, beta, crowd(seed)) for _ in range(2))
    assert (first.spent, first.rounds, first.answer) == (second.spent, second.rounds, second.answer)


@pytest.mark.process
@pytest.mark.parametrize("genome", [*CLASSICS[1:], numbered(COMBINATIONS[-1], 5)], ids=lambda _: "")
def test_emitted_controllers_play_the_same_sealed_and_unsealed(genome: Genome) -> None:
    recordings = [intern_answers(question(number)) for number in range(3)]
    job = Job(Spec("mine", emit(genome)), 0.7, CELL, range(2))
    open_, sealed = (run_job(job, recordings, ReplayRules(sealing=how)) for how in (Sealing.NONE, Sealing.ALL))
    assert open_.failures == sealed.failures == []
    assert (open_.outcomes == sealed.outcomes).all()


def signalled(genome: Genome, policy: Any, seed: int) -> list[Any]:
    """Return the rounds of an episode whose chains waver, with signals that are sometimes unknown or always."""
    rng = random.Random(seed)
    chains = []
    for i in range(64):
        label, silent = rng.choice(["7", "7", "8", "9"]), rng.randint(0, 4)
        probes = [""] * silent + [rng.choice([label, label, "7", "12"]) for _ in range(30)]
        chains.append(chain(label, rng.randint(60, 480), probes, mark=chr(97 + i % 26)))
    unknown = rng.choice([0.0, 0.05, 1.0])
    series = [[None if rng.random() < unknown else rng.randint(300, 1000) for _ in range(30)] for _ in chains]
    environment, state = (
        SignalledEnvironment(chains, INTERVAL, series),
        episode(INTERVAL, max_branches=rng.choice([3, 64])),
    )
    run_sync(run_episode(policy, environment, state))
    return environment.rounds


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(genome=GENOMES, beta=st.floats(0, 1), seed=st.integers(0, 1000))
def test_an_emitted_file_decides_as_its_genome_means(genome: Genome, beta: float, seed: int) -> None:
    rounds = signalled(genome, made(emit(genome))(beta), seed)
    assert rounds == signalled(genome, PlainPolicy(genome, beta), seed)


@pytest.mark.parametrize("parts", [{part: name} for part, names in PARTS.items() for name in names], ids=str)
def test_each_component_decides_as_it_means(parts: dict[str, str]) -> None:
    genome = genome_of(
        {"widen": "growing", "stop": "lead"} | parts, most=(64, 64, 1), first=(4, 16, 1), enough=(64, 64, 1)
    )
    for seed in range(2):
        assert signalled(genome, made(emit(genome))(0.7), seed) == signalled(genome, PlainPolicy(genome, 0.7), seed)


@pytest.mark.parametrize(
    ("parts", "signals"),
    [
        ({}, ()),
        ({"weight": "length", "prune": "unstable", "pool": "all"}, ()),
        ({"weight": "likelihood"}, (Signal.INTERVALS,)),
        ({"filter": "confident"}, (Signal.INTERVALS,)),
        ({"prune": "weak", "weight": "probe"}, (Signal.INTERVALS, Signal.PROBES)),
    ],
    ids=str,
)
def test_a_file_declares_the_signals_that_it_reads(parts: dict[str, str], signals: tuple[Signal, ...]) -> None:
    genome = genome_of(parts)
    assert Spec("mine", emit(genome)).signals == set(signals) == set(signals_of(genome))
    reads = any(word in emit(genome) for word in ("log_probability", ".lowest", "probe_confidence"))
    assert reads is bool(signals)


@pytest.mark.parametrize("component", ["likelihood", "confidence", "length and confidence", "probe"])
def test_without_signals_weighted_votes_count_equally(component: str) -> None:
    parts = {"widen": "growing", "stop": "lead", "prune": "weak", "filter": "confident"}
    spans = {"first": (4, 4, 1), "most": (64, 64, 1), "enough": (64, 64, 1), "least": (2, 2, 1), "lead": (2, 2, 1)}
    weighted, plain = genome_of(parts | {"weight": component}, **spans), genome_of(parts, **spans)
    for seed in range(3):
        chosen, expected = run(weighted, 1.0, crowd(seed)), run(plain, 1.0, crowd(seed))
        counts = [sorted(state.votes.values()) for state in (chosen, expected)]  # probes change the numbers of labels
        assert counts[0] == counts[1]
        assert (chosen.width, chosen.active) == (expected.width, expected.active)


@pytest.mark.parametrize(
    "knob", [knob for knobs in PARTS["weight"].values() for knob in knobs], ids=lambda knob: knob.name
)
def test_each_number_of_a_weight_changes_episodes_that_have_signals(knob: Knob) -> None:
    component = next(name for name, knobs in PARTS["weight"].items() if knob in knobs)
    spans = {"first": (8, 8, 1), "most": (64, 64, 1), "enough": (64, 64, 1), "least": (2, 2, 1), "lead": (4, 4, 1)}
    low, high = (
        made(emit(genome_of({"widen": "growing", "stop": "lead", "weight": component}, **spans, **{knob.name: value})))
        for value in ((knob.low, knob.low, 1), (knob.high, knob.high, 1))
    )
    assert any(
        signalled(genome_of({}), low(1.0), seed) != signalled(genome_of({}), high(1.0), seed) for seed in range(9)
    )


@pytest.mark.parametrize(("power", "expected"), [(-4.0, "7"), (0.0, "9"), (4.0, "9")])
def test_the_sign_of_the_power_says_whether_short_or_long_chains_count_more(power: float, expected: str) -> None:
    short, long = [chain("7", 80)] * 3, [chain("9", 400)] * 4
    genome = genome_of(
        {"weight": "length"}, power=(power, power, 1), first=(7, 7, 1), enough=(7, 7, 1), least=(12, 12, 1)
    )
    environment, state = ScriptedEnvironment([*short, *long], INTERVAL), episode(INTERVAL)
    run_sync(run_episode(made(emit(genome))(1.0), environment, state))
    assert environment.labels.written(state.answer or 0) == expected


def test_growing_waves_run_to_their_end_unless_their_chains_cannot_matter() -> None:
    genome = genome_of(
        {"widen": "growing", "stop": "share"},
        **{"first": (4, 4, 1), "most": (16, 16, 1), "enough": (64, 64, 1), "least": (2, 2, 1), "growth": (1, 1, 1)},
        share=(0.7, 0.7, 1),
    )
    short = [chain("7", 80)] * 3
    waited = run(genome, 1.0, [*short[:2], *[chain("9", 400)] * 2, *short * 4])
    assert waited.width == 8
    stopped = run(genome, 1.0, [*short, chain("9", 4000), *short * 4])
    assert (stopped.width, stopped.branches[3].finished) == (4, False)


# Proposals

BASE = ScoredCandidate(Candidate("cmc", "class CMC: ...\n", "baseline"), 50.0)


def with_scores(candidates: list[Candidate], step: int) -> list[ScoredCandidate]:
    """Return scores that depend only on the source and step; one in five failed."""
    scored = []
    for candidate in candidates:
        chance = random.Random(f"{candidate.source} {step}")
        failed = chance.random() < 0.2
        scored.append(ScoredCandidate(candidate, None if failed else round(chance.uniform(40, 70), 2)))
    return scored


def search(grammar: Grammar, steps: int, seed: int = 0) -> list[list[Candidate]]:
    """Return the batches proposed in `steps` steps after the baselines."""
    standings, proposed = [BASE], []
    for step in range(1, steps + 1):
        proposed.append(grammar.propose(ExplorerContext(seed, step, standings)))
        standings += with_scores(proposed[-1], step)
    return proposed


def test_the_first_batch_holds_the_classics_and_later_ones_have_the_batch_size() -> None:
    first, *later = search(Grammar(batch=3), 3)
    assert [one.source for one in first] == [emit(genome) for genome in CLASSICS]
    assert [len(batch) for batch in later] == [3, 3]
    assert [one.name for one in later[0]] == ["grammar-2-0", "grammar-2-1", "grammar-2-2"]
    assert {one.explorer for batch in (first, *later) for one in batch} == {"grammar"}
    assert all(part in one.note for one in first for part in PARTS)


def test_batches_refine_the_leader_except_every_few_steps_that_draw_new_structures() -> None:
    standings: list[ScoredCandidate] = [BASE]
    for step in range(1, 8):
        context = ExplorerContext(0, step, standings)
        leader = next((one.candidate for one in context.leaders if one.candidate.explorer == "grammar"), None)
        batch = Grammar(batch=4).propose(context)
        if leader is not None and step % REFINED_EVERY:
            check_refined(leader, batch)
        elif leader is not None:
            assert all(one.parent is None and "line" not in one.genome for one in batch)
            assert len({tuple(one.genome[part] for part in PARTS) for one in batch}) > 1
        standings += with_scores(batch, step)


def check_refined(leader: Candidate, batch: list[Candidate]) -> None:
    """Check that a batch keeps the leader's components and has other numbers within their bounds."""
    assert len({one.digest for one in batch} | {leader.digest}) == len(batch) + 1
    for refined in batch:
        assert refined.parent == leader.digest
        assert [refined.genome[part] for part in PARTS] == [leader.genome[part] for part in PARTS]
        assert refined.genome["line"] == leader.genome.get("line", leader.digest)
        for name, kind in space(refined.genome).items():
            assert kind._contains(kind.to_internal_repr(refined.genome[name])), name
        check_file(refined.genome)


def test_proposals_are_determined_by_seed_step_and_standings() -> None:
    assert search(Grammar(batch=3), 5) == search(Grammar(batch=3), 5)
    assert search(Grammar(batch=3), 3)[1:] != search(Grammar(batch=3), 3, seed=1)[1:]


def test_the_grammar_keeps_no_state_between_steps_beyond_the_record() -> None:
    """A new explorer with standings read back from JSON proposes the same as one kept over all steps."""
    grammar, standings = Grammar(batch=3), [BASE]
    for step in range(1, 8):
        context = ExplorerContext(5, step, standings)
        proposed = grammar.propose(context)
        read = [one._replace(candidate=read_again(one.candidate)) for one in standings]
        assert Grammar(batch=3).propose(replace(context, standings=read)) == proposed
        standings = [*standings, *with_scores(proposed, step)]


def read_again(candidate: Candidate) -> Candidate:
    body = json.loads(json.dumps(asdict(candidate)))
    return Candidate(**{**body, "cost": Cost(*body["cost"])})


PROCESS = """
from discovery.search.explorers.grammar import Grammar
from tests.discovery.search.test_grammar import search
print(*(one.digest for batch in search(Grammar(batch=3), 4) for one in batch))
"""


@pytest.mark.process
def test_another_process_proposes_the_same_candidates() -> None:
    """Proposals do not depend on the hash seed."""
    digests = [one.digest for batch in search(Grammar(batch=3), 4) for one in batch]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONHASHSEED": "17"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert done.stdout.split() == digests


def test_when_all_candidates_failed_new_structures_are_drawn() -> None:
    standings = [BASE, *(ScoredCandidate(one, None, failure="no") for one in search(Grammar(), 1)[0])]
    for step in (2, 3):
        batch = Grammar(batch=3).propose(ExplorerContext(0, step, standings))
        assert len(batch) == 3
        assert all(one.parent is None for one in batch)


def test_when_all_scores_are_equal_proposals_continue() -> None:
    standings = [BASE]
    for step in range(1, 9):
        batch = Grammar(batch=2).propose(ExplorerContext(0, step, standings))
        assert batch
        standings += [ScoredCandidate(one, 50.0) for one in batch]


@pytest.mark.parametrize("ends", ["low", "high"])
def test_a_leader_at_its_bounds_can_be_refined(ends: str) -> None:
    parts = COMBINATIONS[-1]
    genome: dict[str, Any] = dict(genome_of(parts))
    for name, kind in space(genome).items():
        if isinstance(kind, FloatDistribution):
            genome[name] = getattr(kind, ends)
    leader = Candidate("grammar-1-0", emit(genome), "grammar", genome=genome)
    batch = Grammar(batch=4).propose(ExplorerContext(0, 2, [BASE, ScoredCandidate(leader, 60.0)]))
    check_refined(leader, batch)
