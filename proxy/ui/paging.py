"""Links between the parts of a long list, and parameters of URLs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import overload
from urllib.parse import urlencode

from proxy.errors import BadRequest


def link(path: str, query: Mapping[str, str], **changes: str | None) -> str:
    """Return a path with the parameters of `query` and `changes`. Empty ones and those changed to None are left out."""
    parameters = {name: value for name, value in {**query, **changes}.items() if value}
    return f"{path}?{urlencode(parameters)}" if parameters else path


def choice(query: Mapping[str, str], name: str, allowed: Mapping[str, object] | tuple[str, ...], default: str) -> str:
    """Return a parameter that has one of a few values. Raises BadRequest."""
    value = query.get(name) or default
    if value not in allowed:
        raise BadRequest(f"{name}: {value!r} is not one of {', '.join(allowed)}", param=name)
    return value


@overload
def number(query: Mapping[str, str], name: str, low: float = 0, high: float = 1e15) -> float | None: ...


@overload
def number(query: Mapping[str, str], name: str, low: float = 0, high: float = 1e15, *, default: float) -> float: ...


def number(
    query: Mapping[str, str], name: str, low: float = 0, high: float = 1e15, *, default: float | None = None
) -> float | None:
    """Return a number from a parameter, or the default if it is empty. Raises BadRequest."""
    text = query.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise BadRequest(f"{name}: {text[:50]!r} is not a number from {low:g} to {high:g}", param=name)
    return value
