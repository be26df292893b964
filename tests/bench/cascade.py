"""Discovery: how many candidates a minute the whole cascade judges."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from controllers.loading import parse_spec
from discovery.afs import afs
from discovery.arena import Arena, Trial
from discovery.cascade import Cascade, Plan, Verdict, fixed_recordings
from discovery.discover import FINE, baselines
from discovery.explorers import Candidate, Context, Standing
from discovery.explorers.grammar import Grammar
from discovery.formats import read_release, release_cell
from discovery.playing import Rules
from discovery.recordings import Cell, Split, intern
from tests.bench.replay import FILE

CELL: Final = Cell("Qwen3-1.7B", "aime24", Split.SEARCH)
WORKERS: Final = 2
STEPS: Final = 4
SHIPPED: Final = "lockstep_lead"
PLAN: Final = Plan(shuffles=20)

Row = tuple[str, str, str, str]


def rows() -> Iterator[Row]:
    """What `make bench` shows of discovery; nothing where the public recordings are not beside the project."""
    file = FILE.with_name("aime24.json.xz")
    if not file.exists():
        return
    cells = {CELL: [intern(recorded) for recorded in read_release(file)]}
    with Arena(cells, Rules(probe_tokens=20), WORKERS) as arena, Arena(fixed_recordings(), Rules(), 1) as probes:
        cascade = Cascade(arena, probes, PLAN)
        known = cascade.judge(baselines(), [])
        search, sealed = (_minute(cascade, known, explorer) for explorer in ("grammar", "llm"))
    yield (
        "cascade, candidates a minute: Qwen3-1.7B aime24, 20 shuffles, two workers",
        f"{search:.0f} from the grammar",
        f"{sealed:.0f} sealed, as those of a model are",
        f"{sealed / search:.2f}",
    )
    yield _validation()


def _validation() -> Row:
    """What was discovered and is shipped beside CMC, on questions no search has seen."""
    files = sorted(FILE.parents[1].glob("*/aime25.json.xz"))
    cells = {release_cell(file): [intern(recorded) for recorded in read_release(file)] for file in files}
    with Arena(cells, Rules(probe_tokens=20), WORKERS) as arena:
        trial = Trial(FINE, range(10))
        found, cmc = (afs(arena.measure(parse_spec(name), trial)) for name in (SHIPPED, "cmc"))
    return (
        f"AFS on aime25, four models, 10 shuffles: {SHIPPED}",
        f"{found:.2f}, sealed",
        f"{cmc:.2f} cmc",
        f"{found - cmc:+.2f} points",
    )


def _minute(cascade: Cascade, known: list[Verdict], explorer: str) -> float:
    """Candidates of a search, judged as `explorer`'s; what it proposes follows from what came of the last."""
    grammar = Grammar(batch=8)
    pairs: list[tuple[Candidate, Verdict]] = []
    began = time.perf_counter()
    for step in range(STEPS):
        standings = [Standing(candidate, verdict.score, (), verdict.failure) for candidate, verdict in pairs]
        proposed = grammar.propose(Context(0, step, standings))
        as_theirs = [replace(candidate, explorer=explorer) for candidate in proposed]
        verdicts = cascade.judge(as_theirs, [*known, *(verdict for _, verdict in pairs)])
        pairs += zip(proposed, verdicts, strict=True)
    return 60 * len(pairs) / (time.perf_counter() - began)
