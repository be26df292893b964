"""Signals in replay: facts carry what was recorded if the controller declares it, and nothing otherwise."""

from __future__ import annotations

import random
import zlib
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from controllers import (
    TO_END,
    Action,
    Advanced,
    Fact,
    Limits,
    Probed,
    Round,
    Signal,
    State,
    advance,
    branch,
    probe,
    run_episode,
    run_sync,
)
from controllers.loading import Spec
from controllers.signals import ALL_SIGNALS, NO_SIGNALS, combine
from discovery.data.packed_rounds import pack_rounds, unpack_rounds
from discovery.data.recordings import Cell, RecordedBranch, RecordedQuestion, Recording, Split, intern_answers
from discovery.data.traces import read_trace, trace_files
from discovery.evaluation.replay import ReplayEnvironment
from discovery.evaluation.replay_jobs import Job, ReplayRules, Sealing, run_job

BRANCH = RecordedBranch(["1", "2"], 25, "7", [9, 9], True, [900, 800, 0], [90, 80, 0], [990, None])
PLAIN = RecordedBranch(["1"], 14, "7", [9])
INTERVALS, PROBES = frozenset({Signal.INTERVALS}), frozenset({Signal.PROBES})

WATCHER = '''
from controllers import advance, answer, branch, probe

class Watcher:
    """Runs two branches one interval at a time and ends with a number that depends on every signal it saw."""

    signals = ("intervals", "probes")

    def __init__(self, beta):
        self.seen = 0

    def decide(self, state):
        for chain in state.branches:
            for value in (chain.confidence, chain.lowest, chain.probe_confidence):
                self.seen = (31 * self.seen + (0 if value is None else value + 1)) % 1009
            total = chain.log_probability
            self.seen = (31 * self.seen + (0 if total is None else int(-1000 * total))) % 1009
        if not state.width:
            return [branch(), branch(), probe(0), probe(1)]
        if state.active:
            moves = [advance(i) for i in state.active]
            return moves + [probe(i) for i in state.active]
        if state.width < 3 + self.seen % 5:
            return [branch(1 + self.seen % 3) for _ in range(1 + self.seen % 2)]
        return [answer(state.leader())]
'''


def recording_of(*branches: RecordedBranch) -> Recording:
    return intern_answers(RecordedQuestion("q", "m", "b", 10, branches, "7"))


def facts_of(
    recording: Recording, rounds: Sequence[Sequence[Action]], signals: frozenset[Signal] = ALL_SIGNALS
) -> list[Fact]:
    environment = ReplayEnvironment(recording, range(recording.branches), signals=signals)
    return [fact for actions in rounds for fact in run_sync(environment.execute(actions))]


def test_facts_carry_the_signals_of_their_interval_and_probe() -> None:
    rounds = [[branch(), probe(0)], [advance(0), probe(0)], [advance(0)], [probe(0)], [advance(0)]]
    assert facts_of(recording_of(BRANCH), rounds) == [
        Advanced(0, 1, 10, False, None, 900, 90),
        Probed(0, 0, 9, 990),
        Advanced(0, 1, 10, False, None, 800, 80),
        Probed(0, 1, 9),  # its confidence is unknown
        Advanced(0, 1, 5, True, 2, 0, 0),
        Probed(0, 2, 0),  # a finished branch shows its label without a probe
        Advanced(0, 0, 0, True, 2),
    ]


@pytest.mark.parametrize(
    ("rounds", "parts"),
    [
        ([[branch(2)]], [(10, 900, 90), (10, 800, 80)]),
        ([[branch(3)]], [(10, 900, 90), (10, 800, 80), (5, 0, 0)]),
        ([[branch(TO_END)]], [(10, 900, 90), (10, 800, 80), (5, 0, 0)]),
        ([[branch()], [advance(0, TO_END)]], [(10, 800, 80), (5, 0, 0)]),
        ([[branch()], [advance(0, 2)]], [(10, 800, 80), (5, 0, 0)]),
    ],
)
def test_facts_of_several_intervals_combine_their_signals(
    rounds: Sequence[Sequence[Action]], parts: Sequence[tuple[int, int, int]]
) -> None:
    fact = facts_of(recording_of(BRANCH), rounds)[-1]
    assert isinstance(fact, Advanced)
    assert (fact.confidence, fact.lowest) == combine(parts)


def test_a_fact_with_an_unknown_interval_has_no_signals() -> None:
    recorded = BRANCH._replace(confidences=[900, None, 700], lowests=[90, None, 70])
    one_by_one = facts_of(recording_of(recorded), [[branch()], [advance(0)], [advance(0)]], INTERVALS)
    assert [fact.confidence for fact in one_by_one] == [900, None, 700]
    assert facts_of(recording_of(recorded), [[branch(TO_END)]], INTERVALS) == [Advanced(0, 3, 25, True, 0)]


def test_an_empty_last_interval_does_not_count() -> None:
    recorded = BRANCH._replace(tokens=20, confidences=[900, 800, None], lowests=[90, 80, None])
    together = facts_of(recording_of(recorded), [[branch(TO_END)]])
    assert together == [Advanced(0, 3, 20, True, 0, *combine([(10, 900, 90), (10, 800, 80)]))]
    assert facts_of(recording_of(recorded), [[branch(2)], [advance(0)]])[-1] == Advanced(0, 1, 0, True, 0)


@pytest.mark.parametrize("signals", [INTERVALS, PROBES])
def test_facts_carry_only_the_declared_signals(signals: frozenset[Signal]) -> None:
    facts = facts_of(recording_of(BRANCH), [[branch(), probe(0)]], signals)
    confidences = [fact.confidence for fact in facts]
    assert confidences == ([900, None] if signals == INTERVALS else [None, 990])


def test_branches_with_and_without_signals_may_be_mixed() -> None:
    facts = facts_of(recording_of(PLAIN, BRANCH), [[branch(), branch(), probe(0), probe(1)], [advance(0)]])
    assert [fact.confidence for fact in facts] == [None, 900, None, 990, None]


def test_signals_follow_the_branch_order() -> None:
    recording = recording_of(PLAIN, BRANCH)
    environment = ReplayEnvironment(recording, [1, 0], signals=ALL_SIGNALS)
    facts = run_sync(environment.execute([branch(), branch()]))
    assert [fact.confidence for fact in facts] == [900, None]


def random_rounds(drawn: random.Random, width: int) -> list[list[Action]]:
    opened = [[branch(drawn.choice([1, 2, TO_END])), probe(index)] for index in range(width)]
    moves = [[advance(index, drawn.choice([1, 3])), probe(index)] for index in drawn.choices(range(width), k=12)]
    return opened + moves


@pytest.mark.parametrize("seed", range(20))
def test_facts_differ_from_those_without_signals_in_nothing_else(seed: int) -> None:
    drawn = random.Random(seed)
    branches = []
    for n in drawn.choices(range(6), k=4):
        confidences, lowests = ([drawn.randrange(1001) for _ in range(n + 1)] for _ in range(2))
        sure = [drawn.randrange(1001) for _ in range(n)]
        tokens = 10 * n + drawn.randrange(10)
        branches.append(RecordedBranch(["1"] * n, tokens, "7", [], True, confidences, lowests, sure))
    rounds = random_rounds(drawn, 4)
    recording = recording_of(*branches)
    plain = facts_of(recording, rounds, NO_SIGNALS)
    stripped = recording_of(*(known._replace(confidences=(), lowests=(), probe_confidences=()) for known in branches))
    assert plain == facts_of(stripped, rounds) == facts_of(stripped, rounds, NO_SIGNALS)
    signalled = facts_of(recording, rounds)
    without = [
        Advanced(fact.branch, fact.intervals, fact.tokens, fact.finished, fact.label)
        if isinstance(fact, Advanced)
        else Probed(fact.branch, fact.label, fact.tokens)
        for fact in signalled
    ]
    assert without == plain


def test_running_facts_of_one_recording_with_equal_signals_are_one_object() -> None:
    recording = recording_of(BRANCH)
    first, second = (facts_of(recording, [[branch(), probe(0)]]) for _ in range(2))
    assert [id(fact) for fact in first] == [id(fact) for fact in second]


def test_packed_rounds_keep_signals() -> None:
    actions = [branch(), branch(TO_END), probe(0)]
    facts: list[Fact] = [
        Advanced(0, 1, 10, False, None, 1000, 0),
        Advanced(1, 3, 25, True, None, 0, 1000),
        Probed(0, None, 9, 500),
    ]
    odd: list[Fact] = [Advanced(0, 1, 10, True, 3, None, 7), Advanced(0, 1, 10, False, None, 7), Probed(0, 3, 9)]
    rounds = [Round(actions, facts), Round([advance(0), advance(0), probe(0)], odd)]
    assert unpack_rounds(pack_rounds(rounds)) == rounds


def test_packed_rounds_without_signals_are_written_and_read_as_before() -> None:
    text = "eAFjYmBgYAJiEPgPBIwQJgabCygOk4PRkkAxZqg4SAyEYWYBmWAAEuMEYpDZIAEAMRgQLg=="
    rounds = [
        Round([branch(), branch()], [Advanced(0, 1, 10, False), Advanced(1, 3, 25, True, 0)]),
        Round([probe(0)], [Probed(0, 1, 9)]),
    ]
    assert unpack_rounds(text) == rounds
    assert zlib.decompress(b64decode(pack_rounds(rounds))) == zlib.decompress(b64decode(text))


def job(sealing: Sealing, traces: Path | None = None) -> list[list[int]]:
    drawn = random.Random(3)
    branches = []
    for _ in range(8):
        n = drawn.randrange(1, 6)
        confidences, lowests = ([drawn.choice([0, 1, 500, 999, 1000]) for _ in range(n + 1)] for _ in range(2))
        probes = [drawn.choice(["1", "7", None]) for _ in range(n)]
        sure = [drawn.choice([None, 0, 431, 1000]) for _ in range(n)]
        branches.append(
            RecordedBranch(probes, 10 * n + drawn.randrange(10), "7", [9] * n, True, confidences, lowests, sure)
        )
    cell = Cell("m", "b", Split.SEARCH)
    played = run_job(
        Job(Spec("watcher", WATCHER), 0.5, cell, range(12)),
        [recording_of(*branches)],
        ReplayRules(8, traces=traces, sealing=sealing),
    )
    assert not played.failures
    outcomes: list[list[int]] = played.outcomes[:, :, 0].tolist()
    return outcomes


@pytest.mark.process
def test_a_sandboxed_controller_sees_the_signals_that_one_outside_sees(tmp_path: Path) -> None:
    inside, outside = job(Sealing.FOREIGN, tmp_path / "in"), job(Sealing.NONE, tmp_path / "out")
    assert inside == outside
    assert len(set(inside[2])) > 1  # the tokens that it spends depend on what it sees
    traces = [read_trace(trace_files(tmp_path / folder)[0]) for folder in ("in", "out")]
    for at in range(12):
        first, second = (trace.rounds(at) for trace in traces)
        assert [(list(a), list(f)) for a, f in first] == [(list(a), list(f)) for a, f in second]
        assert any(fact.confidence is not None for played in first for fact in played.facts)


def test_traces_keep_signals(tmp_path: Path) -> None:
    job(Sealing.NONE, tmp_path)
    (file,) = trace_files(tmp_path)
    trace = read_trace(file)
    for at in range(12):
        replayed = trace.rounds(at)
        rounds: list[Round] = []
        controller = Spec("watcher", WATCHER).factory(0.5)
        run_sync(run_episode(controller, Traced(replayed), State(Limits(10, 8)), lambda _, r: rounds.append(r)))  # noqa: B023
        assert [list(played.actions) for played in rounds] == [list(played.actions) for played in replayed]


class Traced:
    """Environment that returns the facts of the given rounds."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        self._facts = iter([played.facts for played in rounds])

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        return next(self._facts)


def test_the_traces_of_recordings_without_signals_have_no_column_for_them(tmp_path: Path) -> None:
    cell = Cell("m", "b", Split.SEARCH)
    run_job(
        Job(Spec("watcher", WATCHER), 0.5, cell, range(2)),
        [recording_of(*[PLAIN] * 8)],
        ReplayRules(8, traces=tmp_path, sealing=Sealing.NONE),
    )
    with np.load(trace_files(tmp_path)[0]) as archive:
        assert archive["table"].shape[1] == 6
