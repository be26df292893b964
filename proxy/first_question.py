"""The question that people are shown first, in the terminal and in the playground."""

from __future__ import annotations

from typing import Final, NamedTuple


class FirstQuestion(NamedTuple):
    """A question that voting usually solves, and its right answer."""

    question: str
    answer: str


FOR_ANY_MODEL: Final = FirstQuestion("What is 17 * 23? Put the answer in \\boxed{}.", "391")


def first_question(*, is_embedded: bool) -> FirstQuestion:
    """Return the question for a model; the embedded one knows one kind only."""
    if not is_embedded:
        return FOR_ANY_MODEL
    from deploy.embedded.task import EXAMPLE

    return FirstQuestion(EXAMPLE.question, EXAMPLE.answer)
