"""Helpers shared by the commands: the console they print to, and parsing of comma-separated options."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Return a console on standard output, wide enough for every column if that is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def split_names(text: str) -> list[str]:
    """Return the distinct parts of a comma-separated list, in order."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
