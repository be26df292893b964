"""Redaction of answers: hashes that can be compared but not read, for stores that may not hold texts."""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Final

from discovery.answers.forms import canonical

MARK: Final = "veiled:"
_REDACTED: Final = re.compile(MARK + "[0-9a-f]{24}")


def redacted(answer: str) -> str:
    """Return a hash of an answer's canonical form, equal for equal answers. Short answers can be found by guessing."""
    if is_redacted(answer):
        return answer
    form = canonical(answer)
    text = answer.strip() if form is None else f"{form.text}\0{form.unit}"
    return redacted_text(text)


def redacted_text(text: str) -> str:
    """Return a hash of a text as it is, in the form of a redacted answer."""
    return MARK + blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()


def is_redacted(answer: str) -> bool:
    """Return whether an answer is a complete hash as returned by `redacted`, not only text that begins like one."""
    return _REDACTED.fullmatch(answer) is not None
