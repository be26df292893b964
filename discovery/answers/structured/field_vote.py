"""Vote on JSON documents field by field, and select the document that agrees with most of the winning fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class FieldBallot(NamedTuple):
    """A document in the vote."""

    label: int  # equal documents have equal labels
    fields: Mapping[str, str]  # canonical text of each field, by its JSON Pointer


class FieldVote(NamedTuple):
    """The result of a vote on fields."""

    winners: Mapping[str, str | None]  # by field: its winning value; None if most documents lack the field
    agreement: Mapping[str, float]  # by field: share of the ballots that give it the winning value

    def agreeing(self, fields: Mapping[str, str]) -> int:
        """Return with how many winning values a document agrees. It must be one of those that voted."""
        winning = [self.winners[pointer] for pointer in fields]
        equal = sum(value == winner for value, winner in zip(fields.values(), winning, strict=True))
        absent = len(self.winners) - len(self.agreement)  # fields that most documents lack
        return equal + absent - winning.count(None)

    def select(self, ballots: Sequence[FieldBallot]) -> int:
        """Return the index of the ballot that agrees with most winning values.

        Of these the one that most ballots equal, then the first.
        """
        labels = Counter(ballot.label for ballot in ballots)
        scores = [(self.agreeing(ballot.fields), labels[ballot.label]) for ballot in ballots]
        return scores.index(max(scores))


def vote_on_fields(documents: Sequence[Mapping[str, str]]) -> FieldVote:
    """Return the winning value of each field, and the agreement on it. There must be a document.

    A document without a field votes that it is missing; missing fields have no agreement. Of values with equally many
    votes the first wins.
    """
    holders: dict[str, list[int]] = {}  # by field: the documents that have it
    for number, fields in enumerate(documents):
        for pointer in fields:
            holders.setdefault(pointer, []).append(number)
    winners: dict[str, str | None] = {}
    agreement: dict[str, float] = {}
    for pointer, numbers in holders.items():
        values = [documents[number][pointer] for number in numbers]
        value, count = Counter(values).most_common(1)[0]
        if _is_absent(numbers, numbers[values.index(value)], count, len(documents)):
            winners[pointer] = None
        else:
            winners[pointer] = value
            agreement[pointer] = count / len(documents)
    return FieldVote(winners, agreement)


def _is_absent(holders: Sequence[int], first: int, count: int, documents: int) -> bool:
    """Return whether a field's absence has more votes than the `count` of its commonest value, first in `first`."""
    absent = documents - len(holders)
    since = next((at for at, number in enumerate(holders) if at != number), len(holders))  # the first without the field
    return absent > count or (absent == count and since < first)
