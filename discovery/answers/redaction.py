"""Redaction of answers: hashes that can be compared but not read, for stores that may not hold texts.

The hash of an answer with a unit ends in a hash of the unit, so that 5 cm equals 5 but not 5 m, as in `Labels`. Earlier
versions hashed the answer and its unit together, so that 5 cm equalled neither; their hashes have no such end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

from discovery.answers.forms import canonical
from discovery.answers.labels import Labels
from discovery.answers.types import CanonicalForm, FormType

MARK: Final = "veiled:"
UNIT_BYTES: Final = 4
"""Bytes of a unit's hash."""
_REDACTED: Final = re.compile(rf"{MARK}[0-9a-f]{{24}}(?::[0-9a-f]{{{2 * UNIT_BYTES}}})?")


def redacted(answer: str) -> str:
    """Return a hash of an answer's canonical form. Short answers can be found by guessing.

    Hashes of equal answers are equal, except for the end that an answer with a unit has: `are_same_redacted`.
    """
    if is_redacted(answer):
        return answer
    form = canonical(answer)
    if form is None:
        return redacted_text(answer.strip())
    unit = f":{blake2b(form.unit.encode(errors='replace'), digest_size=UNIT_BYTES).hexdigest()}" if form.unit else ""
    return redacted_text(f"{form.text}\0") + unit


def redacted_text(text: str) -> str:
    """Return a hash of a text as it is, in the form of a redacted answer."""
    return MARK + blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()


def is_redacted(answer: str) -> bool:
    """Return whether an answer is a complete hash as returned by `redacted`, not only text that begins like one."""
    return _REDACTED.fullmatch(answer) is not None


def are_same_redacted(answer: str, other: str) -> bool:
    """Return whether two answers are the same by their hashes. Either may be redacted already."""
    labels = RedactedLabels((answer, other))
    return labels.label_of(answer) == labels.label_of(other)


class RedactedLabels:
    """Answers of one question numbered by their hashes, as `Labels` numbers those that can be read."""

    def __init__(self, answers: Iterable[str]) -> None:
        """`answers` are those that will be numbered; any may be redacted already.

        A hash by an earlier version of an answer that can be read among them equals that answer.
        """
        self._labels = Labels()
        self._renamed = {earlier: redacted(answer) for answer in answers for earlier in _earlier_hash(answer)}

    def label_of(self, answer: str) -> int:
        """Return the label of an answer, a new one if it equals none so far."""
        text, _, unit = self.hash_of(answer).removeprefix(MARK).partition(":")
        return self._labels.label_of(CanonicalForm(text, FormType.OTHER, unit=unit), "")

    def hash_of(self, answer: str) -> str:
        """Return the hash of an answer, which answers with and without a unit do not share."""
        hashed = redacted(answer)
        return self._renamed.get(hashed, hashed)


def _earlier_hash(answer: str) -> Iterable[str]:
    """Yield the hash by earlier versions of an answer that can be read and has a unit."""
    form = None if is_redacted(answer) else canonical(answer)
    if form is not None and form.unit:
        yield redacted_text(f"{form.text}\0{form.unit}")
