"""Helpers shared by the commands: the console, printing of untrusted text, parsing of comma-separated options."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from controllers.sandbox.frames import printable


def wide_console() -> Console:
    """Return a console on standard output, wide enough for every column if that is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_plain(console: Console, text: str, style: str = "") -> None:
    """Print untrusted text: no markup, no control characters, and no line breaks at the console's width."""
    console.print(Text(printable(text)), style=style, soft_wrap=True)


def add_plain_row(table: Table, *cells: str, style: str = "") -> None:
    """Add a row of untrusted text: no markup, no control characters."""
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def split_names(text: str) -> list[str]:
    """Return the distinct parts of a comma-separated list, in order."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
