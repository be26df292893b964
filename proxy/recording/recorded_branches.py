"""Convert the facts of an episode to recorded branches that can be replayed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

from controllers import Advanced, Fact, Probed, Round
from discovery.answers import Labels
from discovery.data.recordings import RecordedBranch

ProbesByInterval = Mapping[tuple[int, int], Probed]
"""Probe results by (branch, number of intervals that it had run)."""

SIGNALS: Final = ("confidences", "lowests", "probe_confidences")
"""Fields of a recorded branch that hold signals."""

_NO_PROBES: Final[ProbesByInterval] = MappingProxyType({})


class Recordable(Protocol):
    """An environment that maps labels to answers and knows the signals of its branches."""

    @property
    def labels(self) -> Labels: ...

    def interval_signals(self, index: int, tokens: int) -> Sequence[tuple[int | None, int | None]]:
        """Return confidence and lowest of each interval in the first `tokens` tokens of a branch; empty if unknown."""
        ...


@dataclass(slots=True)
class BranchProgress:
    """Progress of a branch: its intervals, tokens and end."""

    intervals: int = 0  # the last may be shorter
    tokens: int = 0
    finished: bool = False
    label: int | None = None  # once finished


def branches(
    environment: Recordable, rounds: Sequence[Round], late: ProbesByInterval = _NO_PROBES
) -> list[RecordedBranch]:
    """Return the branches of an episode, in the order in which they were opened.

    A branch has one probe after each interval but its last. `late` holds probes that are in no round. A branch that has
    not finished or lacks a probe is censored: its probes stop at the first gap. Its signals are empty if they were not
    measured.
    """

    by_interval = {**late, **probes_by_interval(rounds)}
    return [
        recorded_branch(environment, environment.labels, index, branch, by_interval)
        for index, branch in enumerate(_progress_of_branches(rounds))
    ]


def recorded_branch(
    environment: Recordable, labels: Labels, index: int, branch: BranchProgress, by_interval: ProbesByInterval
) -> RecordedBranch:
    """Return the record of branch `index`, whose answers are in `labels`."""

    def answer(label: int | None) -> str | None:
        return None if label is None else labels.recorded(label)

    expected = branch.intervals - branch.finished  # there is no probe after the last interval
    signals = environment.interval_signals(index, branch.tokens)
    probes = list(_until_gap(by_interval.get((index, intervals)) for intervals in range(1, expected + 1)))
    return RecordedBranch(
        probes=[answer(probe.label) for probe in probes],
        tokens=branch.tokens,
        final=answer(branch.label),
        probe_tokens=[probe.tokens for probe in probes],
        complete=branch.finished and len(probes) == expected,
        confidences=_if_known([confidence for confidence, _ in signals]),
        lowests=_if_known([lowest for _, lowest in signals]),
        probe_confidences=_if_known([probe.confidence for probe in probes]),
    )


def as_json(branch: RecordedBranch) -> dict[str, Any]:
    """Return a branch in the generic recording format. Signals that were not measured are left out."""
    return {name: value for name, value in branch._asdict().items() if name not in SIGNALS or value}


def probes_by_interval(rounds: Sequence[Round]) -> dict[tuple[int, int], Probed]:
    """Return the probe results in `rounds`."""
    probes: dict[tuple[int, int], Probed] = {}
    run: dict[int, int] = defaultdict(int)  # intervals, by branch
    for fact in _facts(rounds):
        if isinstance(fact, Advanced):
            run[fact.branch] += fact.intervals
        else:
            probes[fact.branch, run[fact.branch]] = fact
    return probes


def _progress_of_branches(rounds: Sequence[Round]) -> list[BranchProgress]:
    """Return the progress of each branch, in the order in which they were opened."""
    progress: dict[int, BranchProgress] = defaultdict(BranchProgress)
    for fact in _facts(rounds):
        if isinstance(fact, Advanced):
            branch = progress[fact.branch]
            branch.intervals += fact.intervals
            branch.tokens += fact.tokens
            branch.finished, branch.label = fact.finished, fact.label
    return [progress[index] for index in sorted(progress)]


def _facts(rounds: Sequence[Round]) -> Iterator[Fact]:
    return (fact for played in rounds for fact in played.facts)


def _if_known(signals: Sequence[int | None]) -> Sequence[int | None]:
    """Return the signals, or an empty sequence if all of them are unknown."""
    return () if all(signal is None for signal in signals) else signals


def _until_gap(probes: Iterable[Probed | None]) -> Iterator[Probed]:
    for probe in probes:
        if probe is None:
            return
        yield probe
