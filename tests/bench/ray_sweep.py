"""Ray: a sweep of controllers and β over all cells on a cluster of two workers, compared with a cluster of one.

The time of the sweep needs a machine that does nothing else. How evenly the workers share their work does not.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from controllers.loading import parse_spec
from discovery.data.importers import read_release, release_cell
from discovery.data.recordings import Cell, RecordedQuestion
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import Evaluation
from discovery.evaluation.scores import Score
from discovery.ray_cluster import ray_connection
from tests.bench.process_usage import snapshot, used_since
from tests.bench.replay import FILE
from tests.bench.rows import Row, Size, median_ratio

CONTROLLERS: Final = ("sc@64", "asc", "adaptive_consistency", "short_m_at_k", "cmc", "parallel_probe")
BETAS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
SHUFFLES: Final = 3
"""Orders of the branches: a sweep takes about 12 s of one core. Another start of Ray takes half as long."""
REPEATS: Final = 3
WORKERS: Final = (1, 2)


def rows(size: Size) -> Iterator[Row]:
    """Yield the rows; none if the public recordings are missing."""
    files = sorted(FILE.parents[1].glob("*/aime*.json.xz"))[: size.pick(100, 1)]
    if not files:
        return
    source = _Source({release_cell(file): read_release(file) for file in files})
    sweep = Evaluation(
        source,
        source.cells(),
        [parse_spec(name) for name in CONTROLLERS[: size.pick(len(CONTROLLERS), 2)]],
        BETAS[:: size.pick(1, 4)],
        size.pick(SHUFFLES, 2),
    )
    times: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    busiest: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    outcomes: dict[int, list[bytes]] = {}
    for _ in range(size.pick(REPEATS, 1)):
        for workers, seconds in times.items():
            with ray_connection(None, workers):
                _evaluated(source.smallest)  # starts the workers, which import the program
                used, began = snapshot(os.getpid()), time.perf_counter()
                scores = _evaluated(sweep)
                seconds.append(time.perf_counter() - began)
                busiest[workers].append(max(used_since(used, os.getpid()).values()))
            outcomes[workers] = [score.outcomes.tobytes() for score in scores]
    one, two = WORKERS
    assert outcomes[one] == outcomes[two]
    yield Row(
        "evaluate --engine ray, processor time of the busiest worker, one worker / two",
        f"{statistics.median(busiest[one]):.1f} s",
        f"{statistics.median(busiest[two]):.1f} s",
        *median_ratio(busiest[one], busiest[two]),
    )
    yield Row(
        f"evaluate --engine ray, one worker / two: {len(sweep.specs)} controllers at {len(sweep.betas)} β, "
        f"{len(files)} cells, {sweep.shuffles} shuffles",
        f"{statistics.median(times[one]):.1f} s",
        f"{statistics.median(times[two]):.1f} s, figures identical",
        *median_ratio(times[one], times[two]),
    )


def _evaluated(evaluation: Evaluation) -> list[Score]:
    return evaluation.run(make_engine(EngineName.RAY))


class _Source:
    """Source of recordings that are in memory already."""

    def __init__(self, recorded: Mapping[Cell, Sequence[RecordedQuestion]]) -> None:
        self._recorded = recorded

    @property
    def smallest(self) -> Evaluation:
        """An evaluation of several short jobs, so that each worker gets one."""
        return Evaluation(self, self.cells()[:1], [parse_spec("single")], [0.0, 1.0], 40)

    def cells(self) -> Sequence[Cell]:
        return list(self._recorded)

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        return list(self._recorded[cell])
