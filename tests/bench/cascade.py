"""Discovery: candidates that the evaluation cascade judges per minute, and the score of the shipped controller."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from controllers.loading import parse_spec
from discovery.data.importers import read_release, release_cell
from discovery.data.recordings import Cell, Split, intern_answers
from discovery.evaluation.afs import mean_afs
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.search.cascade import CandidateVerdict, Cascade, CascadePlan, fixed_recordings
from discovery.search.explorers import Candidate, ExplorerContext, ScoredCandidate
from discovery.search.explorers.grammar import Grammar
from discovery.search.loop import FINAL_BETAS, baselines
from discovery.search.trial_pool import TrialPool, TrialSettings
from tests.bench.replay import FILE
from tests.bench.rows import Row, Size

CELL: Final = Cell("Qwen3-1.7B", "aime24", Split.SEARCH)
WORKERS: Final = 2
STEPS: Final = 4
SHIPPED: Final = "lockstep_lead"
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
        cascade = Cascade(arena, probes, CascadePlan(shuffles=size.pick(SHUFFLES, 1)))
        known = cascade.judge(baselines(), [])
        search, sealed = (_minute(cascade, known, explorer, size) for explorer in ("grammar", "llm"))
    yield Row(
        f"cascade, candidates per minute: Qwen3-1.7B aime24, {size.pick(SHUFFLES, 1)} shuffles, two workers",
        f"{search:.0f} unsandboxed, from the grammar explorer",
        f"{sealed:.0f} sandboxed, like those of the LLM explorer",
        f"{sealed / search:.2f}",
    )
    yield _validation(size)


def _validation(size: Size) -> Row:
    """Compare the shipped discovered controller with CMC on questions that no search has seen."""
    files = sorted(FILE.parents[1].glob("*/aime25.json.xz"))[: size.pick(4, 1)]
    shuffles = size.pick(10, 1)
    cells = {release_cell(file): [intern_answers(recorded) for recorded in read_release(file)] for file in files}
    with TrialPool(cells, ReplayRules(probe_tokens=20), WORKERS) as arena:
        trial = TrialSettings(FINAL_BETAS, range(shuffles))
        shipped, cmc = (mean_afs(arena.measure(parse_spec(name), trial)) for name in (SHIPPED, "cmc"))
    return Row(
        f"AFS on aime25, {len(files)} models, {shuffles} shuffles: {SHIPPED}",
        f"{shipped:.2f}, sandboxed",
        f"{cmc:.2f} cmc",
        f"{shipped - cmc:+.2f} points",
    )


def _minute(cascade: Cascade, known: list[CandidateVerdict], explorer: str, size: Size) -> float:
    """Return the candidates per minute of a short grammar search whose candidates are judged as those of `explorer`."""
    grammar = Grammar(batch=size.pick(8, 2))
    pairs: list[tuple[Candidate, CandidateVerdict]] = []
    began = time.perf_counter()
    for step in range(size.pick(STEPS, 1)):
        standings = [ScoredCandidate(candidate, verdict.score, (), verdict.failure) for candidate, verdict in pairs]
        proposed = grammar.propose(ExplorerContext(0, step, standings))
        relabelled = [replace(candidate, explorer=explorer) for candidate in proposed]
        verdicts = cascade.judge(relabelled, [*known, *(verdict for _, verdict in pairs)])
        pairs += zip(proposed, verdicts, strict=True)
    return 60 * len(pairs) / (time.perf_counter() - began)
