"""Definition of one Prometheus metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

M = TypeVar("M", bound=MetricWrapperBase)


class MetricRow(Generic[M]):
    """Definition of a metric. As an attribute of a `Metrics` object it is the metric itself.

    `initial` lists label values that are exported from the start, because Prometheus sees no increase from absent to 1.
    """

    def __init__(
        self,
        kind: type[M],
        name: str,
        meaning: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] | None = None,
        initial: Sequence[str] = (),
    ) -> None:
        self._kind = kind
        self._name = name
        self._meaning = meaning
        self.labels = labels
        self._options: dict[str, Any] = {} if buckets is None else {"buckets": buckets}
        self._initial = initial

    def create(self, registry: CollectorRegistry) -> M:
        """Return the metric, registered in `registry`."""
        metric = self._kind(self._name, self._meaning, self.labels, registry=registry, **self._options)
        for value in self._initial:
            metric.labels(value)
        return metric

    def __get__(self, metrics: object, owner: type) -> M:
        """Tell type checkers what a `Metrics` object holds. At run time the object's own attribute comes first."""
        raise AttributeError(f"{self._name} belongs to an instance of {owner.__name__}")
