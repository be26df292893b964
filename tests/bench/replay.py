"""Replay: the general runner compared with a bare loop; traces; two cores; memory. Needs the public recordings."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from controllers.loading import Spec
from discovery.data.importers import read_release, release_cell
from discovery.data.recordings import Cell, RecordedQuestion, Recording, intern_answers
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import Evaluation
from discovery.evaluation.replay import shuffled_order
from discovery.evaluation.replay_jobs import JobResult, ReplayRules, make_jobs, run_job
from tests.bench import cmc_loop
from tests.bench.rows import Row, Size, median_ratio

FILE: Final = Path(__file__).parents[3] / "shared" / "replay" / "autotts" / "Qwen3-1.7B" / "aime25.json.xz"
SHUFFLES: Final = 100
QUICK: Final = 10  # shuffles of a quick run
BLOCK: Final = 10
"""Shuffles that are timed before the other measurement takes its turn."""
MEASURED: Final = "CMC β=1, Qwen3-1.7B aime25, 100 shuffles"


def rows(size: Size) -> Iterator[Row]:
    """Yield the benchmarks of replay; none if the public recordings are missing."""
    if not FILE.exists():
        return
    recorded = read_release(FILE)
    recordings = [intern_answers(question) for question in recorded]
    yield _runner(recordings, size)
    yield _traces(recordings, size)
    yield _cores(recorded, size)
    yield _memory(size)


def _runner(recordings: Sequence[Recording], size: Size) -> Row:
    """Compare the evaluator with the bare loop; both must give the same figures."""
    forwards = [cmc_loop.forwards(recording) for recording in recordings]
    general: list[JobResult] = []
    bare: list[tuple[bool, int]] = []

    def loop(block: range) -> None:
        for shuffle in block:
            for recording, mine in zip(recordings, forwards, strict=True):
                label, spent = cmc_loop.play(mine, shuffled_order(recording.branches, shuffle), recording.interval, 1.0)
                bare.append((label == recording.reference, spent))

    for block in _blocks(size)[:1]:  # warm-up: fills the caches of rows and facts
        _general(recordings, block, ReplayRules())
        loop(block)
    bare.clear()
    took, loop_took = _alternate(lambda block: general.extend(_general(recordings, block, ReplayRules())), loop, size)
    assert sum(int(result.outcomes[0].sum()) for result in general) == sum(right for right, _ in bare)
    assert sum(int(result.outcomes[2].sum()) for result in general) == sum(spent for _, spent in bare)
    episodes = size.pick(SHUFFLES, QUICK) * len(recordings)
    return Row(
        f"evaluator / bare loop: {MEASURED}",
        f"{sum(took) / episodes * 1e3:.2f} ms per episode",
        f"{sum(loop_took) / episodes * 1e3:.2f} ms, figures identical",
        *median_ratio(took, loop_took),
    )


def _traces(recordings: Sequence[Recording], size: Size) -> Row:
    """Compare evaluation with and without traces."""
    with tempfile.TemporaryDirectory() as folder:
        traced = ReplayRules(traces=Path(folder))
        took, untraced_took = _alternate(
            lambda block: _general(recordings, block, traced),
            lambda block: _general(recordings, block, ReplayRules()),
            size,
        )
        written = sum(file.stat().st_size for file in Path(folder).rglob("*.npz"))
    episodes = size.pick(SHUFFLES, QUICK) * len(recordings)
    return Row(
        f"traces on / off: {MEASURED}",
        f"{sum(took) / episodes * 1e3:.2f} ms, {written / episodes / 1e3:.1f} kB per episode",
        f"{sum(untraced_took) / episodes * 1e3:.2f} ms",
        *median_ratio(took, untraced_took),
    )


def _cores(recorded: Sequence[RecordedQuestion], size: Size) -> Row:
    """Measure `evaluate` after reading the file, on one core and on two."""
    times: dict[EngineName, list[float]] = {EngineName.LOCAL: [], EngineName.PROCESS: []}
    for _ in range(size.pick(3, 1)):
        for name, spent in times.items():
            specs = [Spec("cmc"), Spec("parallel_probe")]
            shuffles = size.pick(SHUFFLES, 2)
            evaluation = Evaluation(_InMemorySource(recorded), [release_cell(FILE)], specs, [0.0, 0.5, 1.0], shuffles)
            began = time.perf_counter()
            evaluation.run(make_engine(name, 2))
            spent.append(time.perf_counter() - began)
    local, pool = times.values()
    return Row(
        "--engine local / process, two workers: cmc and parallel_probe at three β",
        f"{statistics.median(local):.1f} s",
        f"{statistics.median(pool):.1f} s",
        *median_ratio(local, pool),
    )


class _InMemorySource:
    """Source of recordings that are in memory already."""

    def __init__(self, recorded: Sequence[RecordedQuestion]) -> None:
        self._recorded = list(recorded)

    def cells(self) -> Sequence[Cell]:
        return [release_cell(FILE)]

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        return self._recorded


MEMORY: Final = """
import sys
from pathlib import Path
from controllers.loading import Spec
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import Evaluation
from discovery.evaluation.sources import open_source
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
source = open_source(Path(sys.argv[1]))
Evaluation(source, source.cells(), [Spec("cmc")], [1.0], int(sys.argv[2])).run(make_engine(EngineName.LOCAL))
print(before, peak())
"""


def _memory(size: Size) -> Row:
    """Compare the peak memory of a process after imports and after scoring one model and benchmark."""
    command = [sys.executable, "-c", MEMORY, str(FILE), str(size.pick(20, 1))]
    before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return Row(
        "memory to read and score one model and benchmark",
        f"{(after - before) / 1024:.0f} MiB in addition",
        f"{before / 1024:.0f} MiB for imports",
        f"{after / before:.2f}",
    )


def _blocks(size: Size) -> list[range]:
    return [range(begin, begin + BLOCK) for begin in range(0, size.pick(SHUFFLES, QUICK), BLOCK)]


def _general(recordings: Sequence[Recording], block: range, rules: ReplayRules) -> list[JobResult]:
    """Run the jobs of these shuffles as the local engine does."""
    split_up = make_jobs([Spec("cmc")], [1.0], release_cell(FILE), block.stop)
    return [run_job(job, recordings, rules) for job in split_up if job.shuffles.start >= block.start]


def _alternate(
    first: Callable[[range], object], second: Callable[[range], object], size: Size
) -> tuple[list[float], list[float]]:
    """Run two functions on each block in turn; return the seconds of processor time of each.

    They run in this process, so that other programs on the machine change this time less than that of the clock.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for block in _blocks(size):
        for run, spent in zip((first, second), times, strict=True):
            began = time.process_time()
            run(block)
            spent.append(time.process_time() - began)
    return times
