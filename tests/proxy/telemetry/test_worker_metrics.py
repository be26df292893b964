"""Metrics of several workers on one page."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from proxy.telemetry.metrics import Metrics
from proxy.telemetry.worker_metrics import WorkerMetrics, WorkerPlace


def samples(page: bytes, name: str) -> dict[str, float]:
    """Return the sums of a metric's samples by worker."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            if sample.name == name:
                worker = sample.labels.get("worker", "")
                sums[worker] = sums.get(worker, 0) + sample.value
    return sums


async def test_a_process_without_workers_has_no_such_label() -> None:
    metrics = Metrics()
    alone = WorkerMetrics(metrics, None)
    await alone.open()
    assert await alone.exposition() == metrics.exposition()
    await alone.close()


async def test_every_worker_returns_the_metrics_of_all(tmp_path: Path) -> None:
    workers = []
    for number in range(2):
        metrics = Metrics()
        metrics.branches.labels("m", "c", "1").inc(10 + number)
        metrics.upstream_seconds.labels("m").observe(0.02)
        metrics.branches_in_flight.set_function(lambda number=number: 5 + number)  # type: ignore[misc]
        workers.append(WorkerMetrics(metrics, WorkerPlace(number, tmp_path)))
        await workers[-1].open()
    for worker in workers:
        page = await worker.exposition()
        assert samples(page, "autotts_branches_total") == {"0": 10, "1": 11}
        assert samples(page, "autotts_branches_in_flight") == {"0": 5, "1": 6}
        assert samples(page, "autotts_upstream_seconds_count") == {"0": 1, "1": 1}
        assert page.count(b"# TYPE autotts_branches_total counter") == 1
    await workers[1].close()
    assert samples(await workers[0].exposition(), "autotts_branches_total") == {"0": 10}  # the other one has ended
    again = WorkerMetrics(Metrics(), WorkerPlace(1, tmp_path))
    await again.open()
    assert samples(await again.exposition(), "autotts_branches_in_flight") == {"0": 5, "1": 0}
    await again.close()
    await workers[0].close()
