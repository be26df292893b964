"""Vote on functions by their behaviour: functions with the same outcomes for all inputs are one class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from controllers.sandbox.functions import RAISED, RETURNED
from discovery.answers.code.examples import CodeTask


class Behaviour(NamedTuple):
    """Outcomes of a reply's function for each example."""

    outcomes: Sequence[str]  # see `controllers.sandbox.functions`
    satisfied: int  # number of examples for which it returns what the request states
    size: int  # characters of the reply

    @property
    def written(self) -> str:
        """The outcomes as text: values, and types of exceptions after an exclamation mark."""
        return ", ".join(outcome.removeprefix(RETURNED) for outcome in self.outcomes)

    @classmethod
    def of(cls, outcomes: Sequence[str], task: CodeTask, text: str) -> Behaviour | None:
        """Return the behaviour of a reply's function; None if it raises for every example."""
        if all(outcome.startswith(RAISED) for outcome in outcomes):
            return None
        stated = [None if each.expected is None else f"{RETURNED}{each.expected}" for each in task.examples]
        satisfied = sum(outcome == value for outcome, value in zip(outcomes, stated, strict=True))
        return cls(tuple(outcomes), satisfied, len(text))


def finalists(behaviours: Mapping[int, Behaviour]) -> Sequence[int]:
    """Return one branch for each leading class of behaviour, in order: the shortest reply of the class.

    Replies that satisfy most examples lead, and of these the largest classes. Several branches are a tie.
    """
    most = max((behaviour.satisfied for behaviour in behaviours.values()), default=0)
    classes: dict[Sequence[str], list[int]] = defaultdict(list)
    for branch, behaviour in sorted(behaviours.items()):
        if behaviour.satisfied == most:
            classes[behaviour.outcomes].append(branch)
    largest = max(map(len, classes.values()), default=0)
    leading = [members for members in classes.values() if len(members) == largest]
    return sorted(min(members, key=lambda branch: behaviours[branch].size) for members in leading)
