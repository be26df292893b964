"""What the verbs share: where they print, and how lists are given to them."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def names(text: str) -> list[str]:
    """`a, b` as its parts, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
