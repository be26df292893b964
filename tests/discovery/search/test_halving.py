"""Successive halving with the kernel: what passes, what is checked, and that disagreement drops a candidate."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from controllers.loading import Spec
from controllers.signals import ALL_SIGNALS, NO_SIGNALS
from discovery.commands.discover import choose_runner, make_kernel
from discovery.data.recordings import Cell, Recording
from discovery.errors import EngineError, ExplorerError
from discovery.evaluation.replay_jobs import Job, ReplayRules, run_job
from discovery.search.cascade import CandidateVerdict, Cascade, CascadePlan
from discovery.search.explorers import Candidate, ExplorerContext, ScoredCandidate
from discovery.search.explorers.catalogue import ExplorerName
from discovery.search.explorers.classics import CLASSICS
from discovery.search.explorers.controller_writer import emit
from discovery.search.explorers.genome import Genome, space
from discovery.search.explorers.grammar import MOST_FITTED, PARENTS, Grammar
from discovery.search.fixed_recordings import PROBES, fixed_recordings
from discovery.search.halving import Rung, last_orders, rungs_below
from discovery.search.loop import baselines
from discovery.search.trial_pool import TrialPool, TrialSettings
from tests.discovery.search.test_cascade import CELLS, GOOD, written
from tests.discovery.search.test_grammar import check_file

PLAN = CascadePlan(betas=(0.0, 0.5, 1.0), shuffles=6, rungs=(1, 2), few=2)
RUNG = Rung(TrialSettings((0.0,), range(2)), 0)


# Trials and what passes them


@pytest.mark.parametrize(("questions", "orders"), [(1, 100), (120, 100), (240, 50), (2400, 8)])
def test_many_questions_are_tried_under_fewer_orders(questions: int, orders: int) -> None:
    assert last_orders(questions) == orders


def test_trials_have_fewer_orders_than_the_last_one() -> None:
    assert (rungs_below(100), rungs_below(8), rungs_below(2)) == ((2, 8, 32), (2,), ())


def test_the_best_third_of_the_candidates_so_far_passes() -> None:
    scores = list(range(60))
    assert RUNG.reason(99, scores) == RUNG.reason(39.5, scores) == ""
    assert RUNG.reason(38.5, scores) == "scored 38.50 under 2 branch orders, 21 of 60 better; not tried under more"


def test_the_first_candidates_pass_until_there_are_enough() -> None:
    assert RUNG.reason(0.0, []) == RUNG.reason(0.0, list(range(1, 8))) == ""
    assert RUNG.reason(0.0, list(range(1, 9)))


def test_a_candidate_with_the_scores_of_an_earlier_one_is_its_twin() -> None:
    rung, earlier = RUNG._replace(number=1), CandidateVerdict("e" * 64, rungs=(3.5, 4.0, 5.0))
    assert rung.twin_reason(CandidateVerdict("d", rungs=(3.5, 4.25)), [CandidateVerdict("c"), earlier]) == ""
    assert rung.twin_reason(CandidateVerdict("d", rungs=(3.5, 4.0)), [CandidateVerdict("c"), earlier]) == (
        "scores exactly like eeeeeeeeeeee under 2 branch orders; not tried under more"
    )


def test_a_rung_notes_its_score_in_the_verdict() -> None:
    verdict = CandidateVerdict("d")
    assert RUNG.reached(verdict) is None
    noted = RUNG.noted(verdict, 3.5)
    assert (RUNG.reached(noted), noted.rungs) == (3.5, (3.5,))


# The runner


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((ExplorerName.GRAMMAR, False, None, True), True),
        ((ExplorerName.GRAMMAR, False, None, False), False),
        ((ExplorerName.GRAMMAR, False, False, True), False),
        ((ExplorerName.GRAMMAR, True, None, True), False),
        ((ExplorerName.LLM, False, None, True), False),
    ],
)
def test_the_kernel_plays_searches_of_the_grammar_where_numba_is_installed(
    asked: tuple[ExplorerName, bool, bool | None, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer, tune, kernel, is_installed = asked
    monkeypatch.setattr("discovery.commands.discover.is_available", lambda: is_installed)
    assert choose_runner(explorer, tune, kernel) is expected


def test_a_kernel_that_is_asked_for_and_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.commands.discover.is_available", lambda: False)
    with pytest.raises(ExplorerError, match=r"--kernel needs numba: pip install '.\[search\]' in a checkout"):
        choose_runner(ExplorerName.GRAMMAR, False, True)


# Proposals


def test_a_search_with_the_kernel_also_varies_good_genomes() -> None:
    grammar, rng = Grammar(batch=2, varied=20), random.Random(0)
    standings = [ScoredCandidate(one, rng.random()) for one in grammar.propose(ExplorerContext(0, 1, []))]
    assert len(standings) == len(CLASSICS) <= PARENTS
    drawn, refined = (grammar.propose(ExplorerContext(0, step, standings)) for step in (3, 2))
    assert len(drawn) == len(refined) == 22
    assert len({one.digest for one in [*drawn, *(standing.candidate for standing in standings)]}) > 22
    for one in drawn:
        assert set(space(one.genome)) == set(one.genome)
        check_file(one.genome)
    assert grammar.propose(ExplorerContext(0, 3, standings)) == drawn


def test_the_estimator_is_fitted_to_the_best_and_the_latest_results() -> None:
    from discovery.search.explorers.grammar import _fitted

    standings = [ScoredCandidate(Candidate(str(at), f"{at}", "grammar"), float(-at)) for at in range(500)]
    rated = {standing.candidate.digest: standing.score or 0.0 for standing in standings}
    assert [int(one.candidate.name) for one in _fitted(standings, rated)] == [*range(100), *range(400, 500)]
    assert len(_fitted(standings[:150], rated)) == 150 <= MOST_FITTED


# The cascade with the kernel


def genome_file(genome: Genome, number: int) -> Candidate:
    return Candidate(f"g{number}", emit(genome), "grammar", genome=dict(genome))


def cascade_with(stack: ExitStack, arenas: tuple[TrialPool, TrialPool], **changes: Any) -> Cascade:
    """Return a cascade with a kernel, whose rules are those of the arena unless they are changed."""
    from discovery.search.kernel.kernel_pool import KernelPool, KernelRunner

    arena = stack.enter_context(KernelPool(CELLS, replace(ReplayRules(), **changes), 1))
    return Cascade(
        *arenas, PLAN, KernelRunner(arena, stack.enter_context(KernelPool(fixed_recordings(), ReplayRules())))
    )


@pytest.fixture(scope="module")
def arenas() -> Iterator[tuple[TrialPool, TrialPool]]:
    pytest.importorskip("numba", reason="numba is not installed")
    with TrialPool(CELLS, ReplayRules(), 1) as arena, TrialPool(fixed_recordings(), ReplayRules(), 1) as probes:
        yield arena, probes


@pytest.fixture
def cascade(arenas: tuple[TrialPool, TrialPool]) -> Iterator[Cascade]:
    with ExitStack() as stack:
        yield cascade_with(stack, arenas)


CANDIDATES = [*baselines()[:2], *(genome_file(genome, at) for at, genome in enumerate(CLASSICS))]


@pytest.mark.slow
def test_the_kernel_sees_the_signals_that_controller_files_see() -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    genome, trial, recordings = CLASSICS[4], TrialSettings((1.0,), range(2)), fixed_recordings()
    assert genome["weight"] == "length and confidence"
    spec = Spec("weighted", emit(genome))
    played = []
    for signals in (NO_SIGNALS, ALL_SIGNALS):
        rules = ReplayRules(signals=signals)
        with ExitStack() as stack:
            kernel = make_kernel(stack, CELLS, rules, 1)
            (score,) = kernel.probes.submit(spec, genome, trial).scores
        job = Job(spec, 1.0, PROBES, trial.shuffles)
        np.testing.assert_array_equal(score.outcomes, run_job(job, recordings[PROBES], rules).outcomes)
        played.append(score.outcomes)
    assert (played[0] != played[1]).any()


@pytest.mark.process
def test_kernel_and_runner_give_the_same_curves(cascade: Cascade, arenas: tuple[TrialPool, TrialPool]) -> None:
    trial = TrialSettings(PLAN.betas, range(3))
    for candidate in CANDIDATES[2:6]:
        assert cascade.measure(candidate, trial) == Cascade(*arenas, PLAN).measure(candidate, trial)
    assert cascade.measure(CANDIDATES[2], trial) == cascade.measure(CANDIDATES[2], trial, sealed=True)


@pytest.mark.process
def test_candidates_are_halved_and_the_rest_is_scored_under_all_orders(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discovery.search.halving.ALWAYS_KEPT", 1)
    verdicts = cascade.judge([*CANDIDATES, written(GOOD)], [])
    assert [verdict.rungs for verdict in verdicts[:2]] == [(), ()]
    assert all(verdict.score is not None for verdict in verdicts[:2])
    rungs = [len(verdict.rungs) for verdict in verdicts[2:]]
    assert rungs.count(1) >= rungs.count(2) > 0
    scored = [verdict for verdict in verdicts[2:] if verdict.score is not None]
    assert scored
    assert all(len(verdict.rungs) == 2 for verdict in scored)
    assert all("branch orders" in verdict.failure for verdict in verdicts[2:] if verdict.score is None)


@pytest.mark.process
def test_verdicts_of_halving_do_not_depend_on_batches(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.search.halving.ALWAYS_KEPT", 1)
    together = cascade.judge(CANDIDATES, [])
    apart: list[CandidateVerdict] = []
    for candidate in CANDIDATES:
        apart += cascade.judge([candidate], apart)
    assert apart == together


@pytest.mark.process
def test_of_candidates_that_play_alike_the_first_alone_is_tried_to_the_end(
    arenas: tuple[TrialPool, TrialPool],
) -> None:
    """They differ in the fixed episodes, which have more branches than the recordings here."""
    hasty = "def decide(self, state):\n        if state.limits.max_branches > 60 and state.labels: return [answer(0)]\n"
    alike = [written(GOOD), written(GOOD.replace("def decide(self, state):\n", hasty))]
    together = Cascade(*arenas, PLAN).judge(alike, [])
    assert together[0].score is not None
    assert together[1].failure.startswith(f"scores exactly like {together[0].digest[:12]} under 2 branch orders")
    assert together[0].rungs == together[1].rungs
    assert together[1].score is None
    assert Cascade(*arenas, PLAN).judge(alike[1:], together[:1]) == together[1:]


@pytest.mark.process
def test_a_candidate_whose_file_the_kernel_does_not_reproduce_is_dropped(
    arenas: tuple[TrialPool, TrialPool], caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel has another price of probes here, so that it plays other episodes."""
    prober = genome_file(next(one for one in CLASSICS if one["prune"] == "deviant"), 5)
    with ExitStack() as stack:
        (verdict,) = cascade_with(stack, arenas, probe_tokens=50).judge([prober], [])
    assert verdict.failure.startswith("the kernel and the controller file disagree in ")
    assert verdict.score is None
    assert "please report it" in caplog.text


@pytest.mark.process
def test_a_reference_that_the_kernel_does_not_reproduce_ends_the_search(arenas: tuple[TrialPool, TrialPool]) -> None:
    with ExitStack() as stack, pytest.raises(EngineError, match=r"adaptive_consistency: .* disagree .* --no-kernel"):
        cascade_with(stack, arenas, max_branches=2).judge(baselines()[:1], [])


@pytest.mark.process
def test_a_changed_file_is_not_played_by_its_genome(cascade: Cascade, arenas: tuple[TrialPool, TrialPool]) -> None:
    genome = dict(CLASSICS[0])
    changed = Candidate("changed", emit(CLASSICS[-1]), "grammar", genome=genome)
    trial = TrialSettings((0.5,), range(1))
    assert cascade.measure(changed, trial) == cascade.measure(genome_file(CLASSICS[-1], 4), trial)
    assert cascade.measure(changed, trial) != cascade.measure(genome_file(CLASSICS[0], 0), trial)


@pytest.mark.slow
def test_the_kernel_gets_the_recordings_of_the_search_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel opens no file: it is made from the recordings that the search has read."""
    pytest.importorskip("numba", reason="numba is not installed")
    from discovery.commands import discover
    from discovery.search.kernel import kernel_pool

    given: list[Mapping[Cell, Sequence[Recording]]] = []

    class Pool(kernel_pool.KernelPool):
        def __init__(self, cells: Mapping[Cell, Sequence[Recording]], *others: Any) -> None:
            given.append(cells)
            super().__init__(cells, *others)

    monkeypatch.setattr(kernel_pool, "KernelPool", Pool)
    with ExitStack() as stack:
        discover.make_kernel(stack, CELLS, ReplayRules(), 1)
    assert given[0] is CELLS
    assert list(given[1]) == list(fixed_recordings())
