r"""Detect signs that a task has an answer to vote on, besides the answer of a probe.

A probe ends in `\boxed{`, which gets an answer from nearly any text. So a probe's answer alone proves nothing. Another
sign is needed: the question asks for an answer, the branch works towards an answer, or it states the probe's answer.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Final

from discovery.answers import VOTABLE_TYPES, Answer, FormType

LONGEST: Final = 20_000
"""Number of characters, from the end of a question or a branch's text, that are searched for signs."""


@dataclass(slots=True)
class VotabilityState:
    """Evidence so far on whether the task of one request can be voted on."""

    votable: bool  # the task counts as votable
    confirmed: bool  # the task is votable: the client names an answer kind, or a branch has finished with an answer
    probe_answered: bool = False  # a probe, of the check or of the controller, has given an answer
    controller_probed: bool = False  # a probe of the controller has, so that cut branches vote
    unreadable: int = 0  # number of finished branches whose reply has no readable answer


_ARITHMETIC: Final = r"\d\s?[+*×÷^=]\s?\d|\d\s[-−/]\s\d"
_MATHEMATICS: Final = r"\\(?:d?frac|sqrt|boxed|times|cdot|binom|sum|int|pi|theta|angle)(?![a-zA-Z])"
_SUBJECT: Final = (
    r"\d|\b(?:numbers?|sum|product|value|probability|area|volume|length|angle|remainder|integers?|equations?|"
    r"percent(?:age)?|fraction|average|mean|median|total|distance|roots?|digits?|primes?)\b"
)
_PROSE = re.compile(
    r"\b(?:write|compose|draft|create|generate|invent|tell|give|make|need)\b[^.?!\n]{0,60}\b(?:stor(?:y|ies)|poems?|essays?|"
    r"e-?mails?|letters?|songs?|lyrics|haikus?|code|functions?|programs?|scripts?|articles?|posts?|reviews?|dialogues?|"
    r"speech|jokes?|summary|paragraphs?|plans?|recipes?|names?|ideas?|tips|outline|slogans?|list)\b|"
    r"\b(?:summari[sz]e|translate|rewrite|rephrase|paraphrase|proofread|brainstorm|describe)\b",
    re.IGNORECASE,
)
_ASKED = re.compile(
    rf"\bhow\s(?:many|much|long|far|old|tall|fast|likely)\b|{_ARITHMETIC}|{_MATHEMATICS}|"
    r"\bfinal\sanswer\b|\banswer\swith\b|\bwhich\s(?:one\s)?of\sthe(?:se|\sfollowing)\b|\btrue\sor\sfalse\b",
    re.IGNORECASE,
)
_LISTED = re.compile(r"^[^\S\n]{0,9}\(?([AB])[).:]\s", re.IGNORECASE | re.MULTILINE)
_INLINE = re.compile(r"\(([AB])\)", re.IGNORECASE)
_OPTIONS: Final = ((_LISTED, 2000), (_INLINE, 500))
"""Patterns of the option labels A and B, each with the maximum number of characters between them."""
_TASKED = re.compile(
    r"\b(?:solve|compute|calculate|evaluate|simplify|factor(?:i[sz]e)?|differentiate|integrate|determine|find|count|"
    r"what\s(?:is|are|was|were|will)|what's|express)\b",
    re.IGNORECASE,
)
_ABOUT = re.compile(_SUBJECT, re.IGNORECASE)
_WORKED = re.compile(rf"{_ARITHMETIC}|{_MATHEMATICS}|\b(?:the|final)\sanswer\b", re.IGNORECASE)


def asks_for_answer(question: str) -> bool:
    """Return whether a question asks for an answer that can be voted on."""
    text = question[-LONGEST:]
    if _PROSE.search(text) is not None:
        return False
    if _ASKED.search(text) is not None or _offers_options(text):
        return True
    return _TASKED.search(text) is not None and _ABOUT.search(text) is not None


def _offers_options(text: str) -> bool:
    """Return whether an option A with a text is followed by an option B.

    Each label is matched separately. A single pattern for both labels would search from every A, which takes seconds in
    a text with thousands of them.
    """
    for label, max_chars in _OPTIONS:
        ends: deque[int] = deque(maxlen=2)  # of the last two labels A: the text after the very last may be empty
        for match in label.finditer(text):
            if match[1] in "Aa":
                ends.append(match.end())
            elif any(1 <= match.start() - end <= max_chars for end in ends):
                return True
    return False


def works_towards_answer(text: str) -> bool:
    """Return whether a branch's text works towards an answer. Text with code never does: its operators differ."""
    text = text[-LONGEST:]
    return "```" not in text and _WORKED.search(text) is not None


def is_votable(asked: bool, text: str, answer: Answer | None) -> bool:
    """Return whether a probe's answer and another sign together show that the task can be voted on.

    `asked` is whether the question asks for an answer. `text` is the branch's own text.
    """
    if answer is None or answer.form.type not in VOTABLE_TYPES:
        return False
    return asked or works_towards_answer(text) or _states_number(text[-LONGEST:], answer)


def _states_number(text: str, answer: Answer) -> bool:
    """Return whether a text states the number `answer` as its result: `= 7`, `equals **7**`."""
    if answer.form.type is not FormType.NUMBER:
        return False
    written = re.escape(answer.written)
    return re.search(rf"(?:=|≈|\bequals)\s?[*$]{{0,3}}{written}(?!\w|[.,/]\w)", text) is not None
