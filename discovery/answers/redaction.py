"""Answers that can be told apart and not read: what is kept of them where no text may be."""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Final

from discovery.answers.forms import canonical

MARK: Final = "veiled:"
_VEIL: Final = re.compile(MARK + "[0-9a-f]{24}")


def redacted(answer: str) -> str:
    """A hash of an answer's canonical form: spellings of one answer give one hash. It can be guessed at, not read."""
    if is_redacted(answer):
        return answer
    form = canonical(answer)
    text = answer.strip() if form is None else f"{form.text}\0{form.unit}"
    return MARK + blake2b(text.encode(), digest_size=12).hexdigest()


def is_redacted(answer: str) -> bool:
    """Whether an answer has the form of those `redacted` gives; a text that merely begins so is one like any other."""
    return _VEIL.fullmatch(answer) is not None
