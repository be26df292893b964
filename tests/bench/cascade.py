"""Discovery: candidates that the evaluation cascade judges per minute, and the score of the shipped controller."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from controllers.builtin import DEFAULT
from controllers.loading import Spec, parse_spec
from discovery.commands.discover import VARIED
from discovery.data.importers import read_release, release_cell
from discovery.data.recordings import Cell, Recording, Split, intern_answers
from discovery.evaluation.afs import mean_afs
from discovery.evaluation.replay_jobs import Job, ReplayRules, Sealing, run_job
from discovery.search.cascade import CandidateVerdict, Cascade, CascadePlan
from discovery.search.explorers import Candidate, ExplorerContext, ScoredCandidate
from discovery.search.explorers.classics import CLASSICS
from discovery.search.explorers.controller_writer import emit
from discovery.search.explorers.grammar import Grammar
from discovery.search.fixed_recordings import fixed_recordings
from discovery.search.halving import last_orders, rungs_below
from discovery.search.kernel.kernel_pool import KernelCell, KernelPool, KernelRunner
from discovery.search.kernel.policies import policy_records
from discovery.search.loop import FINAL_BETAS, baselines
from discovery.search.trial_pool import TrialPool, TrialSettings
from tests.bench.replay import FILE
from tests.bench.rows import Row, Size, median_ratio

CELL: Final = Cell("Qwen3-1.7B", "aime24", Split.SEARCH)
WORKERS: Final = 2
STEPS: Final = 4
SHIPPED: Final = "lockstep_lead"
BUILT_IN_RIVALS: Final = (DEFAULT, "cmc", "short_m_at_k")
SHUFFLES: Final = 20


def rows(size: Size) -> Iterator[Row]:
    """Yield the benchmarks of discovery; none if the public recordings are missing."""
    file = FILE.with_name("aime24.json.xz")
    if not file.exists():
        return
    cells = {CELL: [intern_answers(recorded) for recorded in read_release(file)]}
    with (
        TrialPool(cells, ReplayRules(probe_tokens=20), WORKERS) as arena,
        TrialPool(fixed_recordings(), ReplayRules(), 1) as probes,
    ):
        orders = size.pick(SHUFFLES, 1)
        cascade = Cascade(arena, probes, CascadePlan(shuffles=orders, rungs=rungs_below(orders)))
        known = cascade.judge(baselines(), [])
        search, sealed = (_minute(cascade, known, explorer, size) for explorer in ("grammar", "llm"))
        compiled, orders = _compiled_minute(arena, probes, known, size)
    yield Row(
        f"cascade, candidates per minute: Qwen3-1.7B aime24, {size.pick(SHUFFLES, 1)} shuffles, two workers",
        f"{search:.0f} unsandboxed, from the grammar explorer",
        f"{sealed:.0f} sandboxed, like those of the LLM explorer",
        f"{sealed / search:.2f}",
    )
    yield Row(
        "grammar search, candidates per minute: Qwen3-1.7B aime24, kernel with two threads / runner with two workers",
        f"{compiled:,.0f}, by successive halving up to {orders} shuffles",
        f"{search:.0f}, {size.pick(SHUFFLES, 1)} shuffles",
        f"{compiled / search:.1f}",
    )
    yield _kernel(cells[CELL], size)
    yield from _validation(size)


def _kernel(recordings: Sequence[Recording], size: Size) -> Row:
    """Compare the compiled kernel with the runner by processor time; both must give the same figures."""
    rules, betas = ReplayRules(probe_tokens=20, sealing=Sealing.NONE), (0.0, 0.5, 1.0)
    genomes, shuffles = CLASSICS[: size.pick(len(CLASSICS), 2)], range(size.pick(3, 1))
    cell = KernelCell(recordings, rules)
    cell.play(policy_records(CLASSICS[0], betas), shuffles)  # compiles, and computes the orders
    took: list[float] = []
    runner_took: list[float] = []
    for genome in genomes:
        began = time.process_time()
        played = cell.play(policy_records(genome, betas), shuffles)
        took.append(time.process_time() - began)
        jobs = [Job(Spec("genome", emit(genome)), beta, CELL, shuffles) for beta in betas]
        began = time.process_time()
        expected = [run_job(job, recordings, rules).outcomes for job in jobs]
        runner_took.append(time.process_time() - began)
        assert (played.outcomes == np.array(expected)).all()
    episodes = len(genomes) * len(betas) * len(shuffles) * len(recordings)
    rates = (f"{episodes / sum(seconds):,.0f}" for seconds in (took, runner_took))
    return Row(
        f"grammar search, episodes per processor second: Qwen3-1.7B aime24, {len(genomes)} genomes, kernel / runner",
        f"{next(rates)}, {sum(took) / episodes * 1e6:.1f} µs each",
        f"{next(rates)}, {sum(runner_took) / episodes * 1e6:,.0f} µs each, figures identical",
        *median_ratio(runner_took, took),
    )


def _validation(size: Size) -> Iterator[Row]:
    """Compare the shipped discovered controller with built-in ones on questions that no search has seen."""
    files = sorted(FILE.parents[1].glob("*/aime25.json.xz"))[: size.pick(4, 1)]
    shuffles = size.pick(10, 1)
    cells = {release_cell(file): [intern_answers(recorded) for recorded in read_release(file)] for file in files}
    with TrialPool(cells, ReplayRules(probe_tokens=20), WORKERS) as arena:
        trial = TrialSettings(FINAL_BETAS, range(shuffles))
        shipped, *others = (mean_afs(arena.measure(parse_spec(name), trial)) for name in (SHIPPED, *BUILT_IN_RIVALS))
    for name, afs in zip(BUILT_IN_RIVALS, others, strict=True):
        yield Row(
            f"AFS on aime25, {len(files)} models, {shuffles} shuffles: {SHIPPED}",
            f"{shipped:.2f}, sandboxed",
            f"{afs:.2f} {name}",
            f"{shipped - afs:+.2f} points",
        )


def _compiled_minute(
    arena: TrialPool, probes: TrialPool, known: list[CandidateVerdict], size: Size
) -> tuple[float, int]:
    """Return the candidates per minute of a search with the kernel, and the most shuffles of a candidate."""
    orders = size.pick(last_orders(len(arena.cells[CELL])), 3)
    plan = CascadePlan(shuffles=orders, rungs=rungs_below(orders))
    with (
        KernelPool(arena.cells, arena.rules, WORKERS) as trials,
        KernelPool(fixed_recordings(), ReplayRules(), 1) as fingerprints,
    ):
        runner = KernelRunner(trials, fingerprints)
        runner.compile()
        cascade = Cascade(arena, probes, plan, runner)
        return _minute(cascade, known, "grammar", size, size.pick(VARIED, 1)), orders


def _minute(cascade: Cascade, known: list[CandidateVerdict], explorer: str, size: Size, varied: int = 0) -> float:
    """Return the candidates per minute of a short grammar search whose candidates are judged as those of `explorer`."""
    grammar = Grammar(batch=size.pick(8, 1), varied=varied)
    pairs: list[tuple[Candidate, CandidateVerdict]] = []
    began = time.perf_counter()
    for step in range(size.pick(STEPS, 1)):
        standings = [ScoredCandidate(candidate, verdict.score, (), verdict.failure) for candidate, verdict in pairs]
        proposed = grammar.propose(ExplorerContext(0, step, standings))
        relabelled = [replace(candidate, explorer=explorer) for candidate in proposed]
        verdicts = cascade.judge(relabelled, [*known, *(verdict for _, verdict in pairs)])
        pairs += zip(proposed, verdicts, strict=True)
    return 60 * len(pairs) / (time.perf_counter() - began)
