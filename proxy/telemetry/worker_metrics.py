"""Metrics of several workers on one page. Each series gets a label `worker`, so that a restart resets only its own.

prometheus_client's multiprocess mode is not used: it drops gauges that are computed when they are read, and it must be
chosen by the environment before its first import. Workers read each other's metrics over Unix sockets instead.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from proxy.telemetry.metrics import Metrics

READ_S: Final = 2.0
"""Seconds that another worker has to return its metrics. After that they are missing from the page."""
LABEL: Final = "worker"
_NUMBER: Final = re.compile(r"(\d+)\.sock")


class WorkerPlace(NamedTuple):
    """Number of a worker among those of one supervisor, and the folder of their sockets."""

    number: int
    folder: Path

    @property
    def socket(self) -> Path:
        """Unix socket on which the worker returns its metrics."""
        return self.folder / f"{self.number}.sock"


class WorkerMetrics:
    """The metrics of all workers, or of the only process if `place` is None."""

    def __init__(self, metrics: Metrics, place: WorkerPlace | None) -> None:
        self._metrics = metrics
        self._place = place
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen for other workers."""
        if self._place is not None:
            self._place.socket.unlink(missing_ok=True)  # of an earlier worker with this number
            self._server = await asyncio.start_unix_server(self._answer, self._place.socket)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(self._metrics.exposition())
            await writer.drain()
        writer.close()

    async def exposition(self) -> bytes:
        """Return the metrics of all workers in the Prometheus text format."""
        if self._place is None:
            return self._metrics.exposition()
        numbers = sorted(int(match[1]) for path in self._place.folder.iterdir() if (match := _NUMBER.search(path.name)))
        pages = await asyncio.gather(*(self._page(WorkerPlace(number, self._place.folder)) for number in numbers))
        return generate_latest(_Merged(zip(numbers, pages, strict=True)))

    async def _page(self, place: WorkerPlace) -> str:
        """Return the page of one worker, empty if it does not answer."""
        if place == self._place:
            return self._metrics.exposition().decode()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(READ_S):
                reader, writer = await asyncio.open_unix_connection(place.socket)
                try:
                    return (await reader.read()).decode()
                finally:
                    writer.close()
        return ""


class _Merged(CollectorRegistry):
    """Registry of the families of several pages, with the worker of each sample as a label."""

    def __init__(self, pages: Iterable[tuple[int, str]]) -> None:
        super().__init__()
        self._families: dict[str, Metric] = {}
        for number, page in pages:
            for family in text_string_to_metric_families(page):
                merged = self._families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, LABEL: str(number)}
                    merged.samples.append(sample._replace(labels=labels))

    def collect(self) -> Iterator[Metric]:
        """Return the families."""
        return iter(self._families.values())
