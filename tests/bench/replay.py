"""Replay: the general runner beside a bare loop, traces, two cores beside one, memory. Needs the public recordings."""

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
"""Shuffles timed at a stretch, before it is the other's turn."""
MEASURED: Final = "CMC β=1, Qwen3-1.7B aime25, 100 shuffles"


def rows(size: Size) -> Iterator[Row]:
    """Yield the rows of replay, none where the public recordings are not beside the project."""
    if not FILE.exists():
        return
    recorded = read_release(FILE)
    recordings = [intern_answers(one) for one in recorded]
    yield _runner(recordings, size)
    yield _traces(recordings, size)
    yield _cores(recorded, size)
    yield _memory(size)


def _runner(recordings: Sequence[Recording], size: Size) -> Row:
    """The evaluator's way beside the bare loop; both must give the same figures."""
    forwards = [cmc_loop.forwards(recording) for recording in recordings]
    general: list[JobResult] = []
    bare: list[tuple[bool, int]] = []

    def loop(block: range) -> None:
        for shuffle in block:
            for recording, mine in zip(recordings, forwards, strict=True):
                label, spent = cmc_loop.play(mine, shuffled_order(recording.branches, shuffle), recording.interval, 1.0)
                bare.append((label == recording.reference, spent))

    for block in _blocks(size)[:1]:  # warm up: every branch's plain rows, every table
        _general(recordings, block, ReplayRules())
        loop(block)
    bare.clear()
    took, beside = _alternate(lambda block: general.extend(_general(recordings, block, ReplayRules())), loop, size)
    assert sum(int(one.outcomes[0].sum()) for one in general) == sum(right for right, _ in bare)
    assert sum(int(one.outcomes[2].sum()) for one in general) == sum(spent for _, spent in bare)
    episodes = size.pick(SHUFFLES, QUICK) * len(recordings)
    return Row(
        f"evaluator / bare loop: {MEASURED}",
        f"{sum(took) / episodes * 1e3:.2f} ms an episode",
        f"{sum(beside) / episodes * 1e3:.2f} ms, figures identical",
        *median_ratio(took, beside),
    )


def _traces(recordings: Sequence[Recording], size: Size) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        traced = ReplayRules(traces=Path(folder))
        took, beside = _alternate(
            lambda block: _general(recordings, block, traced),
            lambda block: _general(recordings, block, ReplayRules()),
            size,
        )
        written = sum(file.stat().st_size for file in Path(folder).rglob("*.npz"))
    episodes = size.pick(SHUFFLES, QUICK) * len(recordings)
    return Row(
        f"traces on / off: {MEASURED}",
        f"{sum(took) / episodes * 1e3:.2f} ms, {written / episodes / 1e3:.1f} kB an episode",
        f"{sum(beside) / episodes * 1e3:.2f} ms",
        *median_ratio(took, beside),
    )


def _cores(recorded: Sequence[RecordedQuestion], size: Size) -> Row:
    """Everything `evaluate` does once the file is read, on one core and on two."""
    times: dict[EngineName, list[float]] = {EngineName.LOCAL: [], EngineName.PROCESS: []}
    for _ in range(size.pick(3, 1)):
        for name, spent in times.items():
            specs = [Spec("cmc"), Spec("parallel_probe")]
            shuffles = size.pick(SHUFFLES, QUICK)
            evaluation = Evaluation(_Held(recorded), [release_cell(FILE)], specs, [0.0, 0.5, 1.0], shuffles)
            began = time.perf_counter()
            evaluation.run(make_engine(name, 2))
            spent.append(time.perf_counter() - began)
    one, two = times.values()
    return Row(
        "--engine local / process, two workers: cmc and parallel_probe at three β",
        f"{statistics.median(one):.1f} s",
        f"{statistics.median(two):.1f} s",
        *median_ratio(one, two),
    )


class _Held:
    """A source of recordings that have been read."""

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
    """Peak memory of a process that reads and scores one model and benchmark, beside one that only imports."""
    command = [sys.executable, "-c", MEMORY, str(FILE), str(size.pick(20, 1))]
    before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return Row(
        "memory: one model and benchmark, read and scored",
        f"{(after - before) / 1024:.0f} MiB more",
        f"{before / 1024:.0f} MiB for imports",
        f"{after / before:.2f}",
    )


def _blocks(size: Size) -> list[range]:
    return [range(begin, begin + BLOCK) for begin in range(0, size.pick(SHUFFLES, QUICK), BLOCK)]


def _general(recordings: Sequence[Recording], block: range, rules: ReplayRules) -> list[JobResult]:
    """What the local engine does for these shuffles."""
    split_up = make_jobs([Spec("cmc")], [1.0], release_cell(FILE), block.stop)
    return [run_job(job, recordings, rules) for job in split_up if job.shuffles.start >= block.start]


def _alternate(
    measured: Callable[[range], object], beside: Callable[[range], object], size: Size
) -> tuple[list[float], list[float]]:
    """Seconds of both for each block, turn by turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for block in _blocks(size):
        for run, spent in zip((measured, beside), times, strict=True):
            began = time.perf_counter()
            run(block)
            spent.append(time.perf_counter() - began)
    return times
