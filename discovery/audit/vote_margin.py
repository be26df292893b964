"""Sentences on the votes behind an answer. `autotts trace show` and the dashboard share them."""

from __future__ import annotations

from collections.abc import Iterable


def format_branch_count(count: int, which: str) -> str:
    """Return a number of branches in words, such as `5 finished branches`."""
    return f"{count} {which} branch" + ("" if count == 1 else "es")


def describe_margin(answer: str, votes: Iterable[tuple[str, int]], of: str) -> str:
    """Return a text such as ` (5 of 7 finished branches; next 9 with 2)`. `of` says which branches voted.

    `votes` are those for each answer, `answer` included.
    """
    own, rival, most = 0, "", 0
    for text, count in votes:
        if text == answer:
            own = count
        elif count > most:
            rival, most = text, count
    if not most:
        behind = "no other was given"
    elif most == own:
        behind = f"a tie with {rival}"
    else:
        behind = f"next {rival} with {most}" if most < own else f"{rival} had more, {most}"
    return f" ({own} of {of}; {behind})"


def describe_decision(decider: str, answer: str | None, margin: str) -> str:
    """Return a text such as `The controller answered 7 (5 of 7 finished branches; next 9 with 2)`."""
    return f"{decider} ended it without an answer{margin}" if answer is None else f"{decider} answered {answer}{margin}"


def describe_width(opened: int, most: int) -> str:
    """Return a text such as `; all 64 branches that it could open were used`, empty if there was room for more."""
    return f"; all {most} branches that it could open were used" if opened >= most > 1 else ""


def describe_agreement(agreement: float | None, confidence: float | None) -> str:
    """Return a sentence on an answer's agreement and confidence, empty if nothing could vote."""
    if agreement is None or confidence is None:
        return ""
    return f"The answer had agreement {agreement:.2f} and confidence {confidence:.2f}."
