"""Source code as HTML with classes for its tokens, and differences between two files. All text is escaped."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import DiffLexer, PythonLexer


def python_html(source: str) -> Markup:
    """Return Python source as highlighted HTML."""
    return Markup(highlight(source, PythonLexer(stripnl=False), _formatter()))


def diff_html(before: str, after: str, names: tuple[str, str]) -> Markup:
    """Return the differences between two files as highlighted HTML; empty if they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="")
    text = "\n".join(lines)
    return Markup(highlight(text, DiffLexer(stripnl=False), _formatter())) if text else Markup()


@cache
def _formatter() -> Any:
    return HtmlFormatter(nowrap=True, classprefix="py-")
