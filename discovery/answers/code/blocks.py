"""Fenced blocks of Python code in a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_BLOCKS: Final = 8
"""Maximum number of blocks of a reply that are read: the last ones."""
MAX_CHARS: Final = 40_000
"""Maximum number of characters of all blocks together."""

_FENCES: Final = ("```", "~~~")
_TAGS: Final = frozenset({"", "py", "python", "python3"})
"""Languages of blocks that are read, in lower case."""


def code_blocks(text: str) -> Sequence[str]:
    """Return the last complete fenced blocks of Python in order; the whole text if it has no fence."""
    blocks: list[str] = []
    block: list[str] | None = None
    fence, tag = "", ""
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if block is None and stripped.startswith(_FENCES):
            fence, block = stripped[:3], []
            tag = stripped.lstrip(fence[0]).strip().casefold().partition(" ")[0]
        elif block is not None and stripped.startswith(fence):
            if tag in _TAGS:
                blocks.append("".join(block))
            block = None
        elif block is not None:
            block.append(line)
    if not fence:
        blocks = [text]
    kept: list[str] = []
    chars = 0
    for code in reversed(blocks[-MAX_BLOCKS:]):
        chars += len(code)
        if chars > MAX_CHARS:
            break
        kept.append(code)
    return kept[::-1]
