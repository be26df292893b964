"""Fenced code blocks of Markdown pages, and the commands in those that hold shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

AGENT_LIBRARIES: Final = ("pydantic_ai", "agents", "instructor", "pydantic")
"""Libraries whose snippets need an upstream that calls tools."""
_FENCED: Final = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced code block and its place."""

    page: str  # relative to the project
    line: int  # of its first line of code
    language: str  # as the fence names it; empty if it names none
    code: str

    @property
    def place(self) -> str:
        """The place in the form `page:line` that editors open."""
        return f"{self.page}:{self.line}"


def fenced_blocks(page: Path, root: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    text = page.read_text()
    for match in _FENCED.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        yield Block(str(page.relative_to(root)), line, match[1].strip(), match[2])


def agent_library(block: Block) -> str:
    """Return the library of AGENT_LIBRARIES that a snippet imports; empty if none."""
    imported = re.findall(r"^(?:from|import) (\w+)", block.code, re.MULTILINE) if block.language == "python" else []
    return next((library for library in AGENT_LIBRARIES if library in imported), "")


def shell_commands(code: str) -> Iterator[str]:
    """Yield the commands of a shell block, several lines of one command together; comments are left out.

    Raises ValueError if a quotation is never closed.
    """
    command = ""
    for line in code.splitlines():
        command += f"\n{line}" if command else line
        if _is_complete(command):
            if parts := shlex.split(command, comments=True):
                yield _without_comment(command) if parts else command
            command = ""
    if command.strip():
        raise ValueError(f"this command has no end: {command}")


def _is_complete(command: str) -> bool:
    if command.endswith("\\"):
        return False
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def _without_comment(command: str) -> str:
    """Return a command without a comment at the end of its only line."""
    if "\n" in command or "#" not in command:
        return command.strip()
    for at in (match.start() for match in re.finditer(r"\s#", command)):
        if shlex.split(command[:at]) == shlex.split(command, comments=True):
            return command[:at].strip()
    return command.strip()
