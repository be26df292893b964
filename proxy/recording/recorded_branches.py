"""Convert the facts of an episode to recorded branches that can be replayed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from controllers import Advanced, Fact, Probed, Round
from discovery.answers import Labels
from discovery.data.recordings import RecordedBranch

ProbesByInterval = Mapping[tuple[int, int], Probed]
"""Probe results by (branch, number of intervals that it had run)."""

_NO_PROBES: Final[ProbesByInterval] = MappingProxyType({})


class HasLabels(Protocol):
    """An environment that maps labels to answers."""

    @property
    def labels(self) -> Labels: ...


class _Progress:
    """Progress of a branch: its intervals, tokens and end."""

    __slots__ = ("finished", "intervals", "label", "tokens")

    def __init__(self) -> None:
        self.intervals = 0
        self.tokens = 0
        self.finished = False
        self.label: int | None = None  # once finished


def branches(
    environment: HasLabels, rounds: Sequence[Round], late: ProbesByInterval = _NO_PROBES
) -> list[RecordedBranch]:
    """Return the branches of an episode, in the order in which they were opened.

    A branch has one probe after each interval but its last. `late` holds probes that are in no round. A branch that has
    not finished or lacks a probe is censored: its probes stop at the first gap.
    """

    def answer(label: int | None) -> str | None:
        return None if label is None else environment.labels.written(label)

    by_interval = {**late, **probes_by_interval(rounds)}
    recorded = []
    for index, branch in enumerate(_progress_of_branches(rounds)):
        expected = branch.intervals - branch.finished  # there is no probe after the last interval
        probes = list(_until_gap(by_interval.get((index, intervals)) for intervals in range(1, expected + 1)))
        recorded.append(
            RecordedBranch(
                probes=[answer(probe.label) for probe in probes],
                tokens=branch.tokens,
                final=answer(branch.label),
                probe_tokens=[probe.tokens for probe in probes],
                complete=branch.finished and len(probes) == expected,
            )
        )
    return recorded


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


def _progress_of_branches(rounds: Sequence[Round]) -> list[_Progress]:
    """Return the progress of each branch, in the order in which they were opened."""
    progress: dict[int, _Progress] = defaultdict(_Progress)
    for fact in _facts(rounds):
        if isinstance(fact, Advanced):
            branch = progress[fact.branch]
            branch.intervals += fact.intervals
            branch.tokens += fact.tokens
            branch.finished, branch.label = fact.finished, fact.label
    return [progress[index] for index in sorted(progress)]


def _facts(rounds: Sequence[Round]) -> Iterator[Fact]:
    return (fact for played in rounds for fact in played.facts)


def _until_gap(probes: Iterable[Probed | None]) -> Iterator[Probed]:
    for probe in probes:
        if probe is None:
            return
        yield probe
