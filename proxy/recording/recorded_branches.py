"""From the facts of an episode to recorded branches, in the terms in which replay runs them again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from controllers import Advanced, Fact, Probed, Round
from discovery.answers import Labels
from discovery.data.recordings import RecordedBranch

Asked = Mapping[tuple[int, int], Probed]
"""What branches said when they were asked, by branch and the intervals it had run."""

_NOTHING: Final[Asked] = MappingProxyType({})


class Labelled(Protocol):
    """An environment that knows its labels' answers."""

    @property
    def labels(self) -> Labels: ...


class _Course:
    """How far a branch has come."""

    __slots__ = ("finished", "intervals", "label", "tokens")

    def __init__(self) -> None:
        self.intervals = 0
        self.tokens = 0
        self.finished = False
        self.label: int | None = None  # once finished


def branches(environment: Labelled, rounds: Sequence[Round], late: Asked = _NOTHING) -> list[RecordedBranch]:
    """The branches of an episode as it went, in the order they were opened.

    A probe stands for each whole interval after which its branch went on; one that no round has may be `late`. A branch
    that has a gap in them, or was not seen to end, is censored: its probes end at the gap.
    """

    def written(label: int | None) -> str | None:
        return None if label is None else environment.labels.written(label)

    said = {**late, **asked(rounds)}
    recorded = []
    for index, course in enumerate(_courses(rounds)):
        whole = course.intervals - course.finished  # it is not asked after the interval it ends in
        probes = list(_to_gap(said.get((index, intervals)) for intervals in range(1, whole + 1)))
        recorded.append(
            RecordedBranch(
                probes=[written(probe.label) for probe in probes],
                tokens=course.tokens,
                final=written(course.label),
                probe_tokens=[probe.tokens for probe in probes],
                complete=course.finished and len(probes) == whole,
            )
        )
    return recorded


def asked(rounds: Sequence[Round]) -> dict[tuple[int, int], Probed]:
    """What was said in `rounds`."""
    said: dict[tuple[int, int], Probed] = {}
    run: dict[int, int] = defaultdict(int)  # intervals, by branch
    for fact in _facts(rounds):
        if isinstance(fact, Advanced):
            run[fact.branch] += fact.intervals
        else:
            said[fact.branch, run[fact.branch]] = fact
    return said


def _courses(rounds: Sequence[Round]) -> list[_Course]:
    """The branches, in the order they were opened."""
    courses: dict[int, _Course] = defaultdict(_Course)
    for fact in _facts(rounds):
        if isinstance(fact, Advanced):
            course = courses[fact.branch]
            course.intervals += fact.intervals
            course.tokens += fact.tokens
            course.finished, course.label = fact.finished, fact.label
    return [courses[index] for index in sorted(courses)]


def _facts(rounds: Sequence[Round]) -> Iterator[Fact]:
    return (fact for played in rounds for fact in played.facts)


def _to_gap(probes: Iterable[Probed | None]) -> Iterator[Probed]:
    for probe in probes:
        if probe is None:
            return
        yield probe
