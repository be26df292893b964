"""Label sets of all metrics that have one label, such as `controller`, so that those of one value can be removed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from prometheus_client.metrics import MetricWrapperBase

from proxy.telemetry.metric_row import MetricRow
from proxy.telemetry.metrics import Metrics


class LabelSets:
    """The label sets that the metrics with one label have now."""

    def __init__(self, metrics: Metrics, label: str) -> None:
        self._metrics = metrics
        self._label = label
        self._rows: list[tuple[MetricWrapperBase, tuple[str, ...]]] = [
            (getattr(metrics, name), tuple(row.labels))
            for name, row in vars(Metrics).items()
            if isinstance(row, MetricRow) and label in row.labels
        ]

    def values(self) -> set[str]:
        """Return all values of the label."""
        return {labels[self._label] for metric, _ in self._rows for labels in _labels(metric)}

    def remove(self, values: Collection[str]) -> None:
        """Remove all label sets that have one of `values`. Metrics counted later begin a new one, at 0."""
        if not values:
            return
        for metric, names in self._rows:
            retired = [labels for labels in _labels(metric) if labels[self._label] in values]
            for each in {tuple(labels[name] for name in names) for labels in retired}:
                self._metrics.children.pop((metric, *each), None)
                metric.remove(*each)


def _labels(metric: MetricWrapperBase) -> Iterator[dict[str, str]]:
    return (sample.labels for family in metric.collect() for sample in family.samples)
