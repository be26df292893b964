"""Vote on tool calls: first whether to call, then which tools, then with which arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from discovery.answers.structured.canonical_json import InvalidJson, canonical_text, fields_of, parse_json
from discovery.answers.structured.defaults import MAX_STEPS, with_defaults
from discovery.answers.structured.field_vote import vote_on_fields

LEAST_STEPS: Final = 1000
"""Steps in which the defaults of each call are filled in. All calls share MAX_STEPS beyond that."""


class CallSet(NamedTuple):
    """The tool calls of a reply, in an order that does not depend on the reply's. Equal sets are one vote."""

    calls: tuple[tuple[str, str], ...]  # pairs of a name and the canonical text of its arguments, sorted
    fields: tuple[tuple[str, str], ...]  # the same arguments one by one, as pairs of a pointer and canonical text

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the called tools, sorted; a tool that is called twice occurs twice."""
        return tuple(name for name, _ in self.calls)


class ToolBallot(NamedTuple):
    """A reply in the vote."""

    label: int | None  # equal replies have equal labels; None: no call, and no answer that can be compared
    calls: CallSet | None = None  # None: it calls no tool


class ToolSchemas:
    """The tools of a request: schemas of their arguments, and arguments that are not compared."""

    def __init__(self, schemas: Mapping[str, Any], exclude: Iterable[str] = ()) -> None:
        """`schemas` are by tool. `exclude` names arguments, of all tools or of one as `TOOL.ARGUMENT`."""
        self._schemas = schemas
        self._exclude = frozenset(exclude)

    def read(self, calls: Sequence[tuple[str, str]]) -> CallSet | None:
        """Return the set of calls, given as names and arguments; None if any of the arguments is not JSON.

        No arguments at all are an empty object, as tools without parameters get them.
        """
        read = []
        steps = max(LEAST_STEPS, MAX_STEPS // max(1, len(calls)))
        try:
            for name, arguments in calls:
                value = with_defaults(parse_json(arguments.strip() or "{}"), self._schemas.get(name), steps)
                if isinstance(value, dict):
                    value = {key: member for key, member in value.items() if not self._is_excluded(name, key)}
                read.append((name, canonical_text(value), value))
        except InvalidJson:
            return None
        read.sort(key=lambda call: call[:2])
        fields = tuple(
            (f"{number}{pointer}", text)
            for number, (_, _, value) in enumerate(read)
            for pointer, text in fields_of(value).items()
        )
        return CallSet(tuple((name, text) for name, text, _ in read), fields)

    def _is_excluded(self, tool: str, argument: str) -> bool:
        return argument in self._exclude or f"{tool}.{argument}" in self._exclude


def select_by_calls(ballots: Sequence[ToolBallot]) -> int:
    """Return the index of the ballot nearest to the winning vote.

    The ballots vote on whether a tool is called; the majority on which tools, as a multiset of names; its majority on
    the arguments. If no arguments have more votes than others, the reply that agrees with most single arguments wins.
    Without a call, the most frequent answer wins. Of equals, the first.
    """
    indices = _largest(range(len(ballots)), [ballot.calls is not None for ballot in ballots])
    if ballots[indices[0]].calls is None:
        labels = [ballot.label for ballot in ballots]
        answered = [index for index in indices if labels[index] is not None]
        return _largest(answered or indices, labels)[0]
    calls = [ballot.calls or CallSet((), ()) for ballot in ballots]
    indices = _largest(indices, [each.names for each in calls])
    counts = Counter(calls[index].calls for index in indices)
    vote = vote_on_fields([dict(calls[index].fields) for index in indices])
    scores = {index: (counts[calls[index].calls], vote.agreeing(dict(calls[index].fields))) for index in indices}
    return max(indices, key=lambda index: scores[index])


def _largest(indices: Sequence[int], values: Sequence[Hashable]) -> list[int]:
    """Return the indices whose value is the most frequent one among them; of equally frequent ones, the first."""
    value, _ = Counter(values[index] for index in indices).most_common(1)[0]
    return [index for index in indices if values[index] == value]
