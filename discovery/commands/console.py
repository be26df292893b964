"""Helpers shared by the commands: the console, printing of untrusted text, parsing of comma-separated options."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from controllers.sandbox.frames import printable

UNWRAPPED_WIDTH: Final = 10_000
"""Width of an output that is not a terminal, in characters: programs search it by lines, so none is broken."""


def wide_console() -> Console:
    """Return a console on standard output that breaks no line if that is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=UNWRAPPED_WIDTH)


def print_plain(console: Console, text: str, style: str = "") -> None:
    """Print untrusted text: no markup, no control characters, and no line breaks at the console's width."""
    console.print(Text(printable(text)), style=style, soft_wrap=True)


def add_plain_row(table: Table, *cells: str, style: str = "") -> None:
    """Add a row of untrusted text: no markup, no control characters."""
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def split_names(text: str) -> list[str]:
    """Return the distinct parts of a comma-separated list, in order."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
