"""A JSON object changed in its bytes: members taken out or given another value, all else as it came."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, Final, NamedTuple

_DECODER: Final = json.JSONDecoder(parse_int=str, parse_float=str)
_SPACE: Final = " \t\n\r"


class _Member(NamedTuple):
    """A member of the object: its key, and where key and value stand."""

    key: str
    begin: int
    value: int
    end: int


def splice(raw: bytes, *, drop: Collection[str] = (), put: Mapping[str, Any]) -> bytes:
    """The object `raw` without the members `drop`, and with the values `put`, which are added where they are missing.

    `raw` must be a JSON object; it comes back as it is where there is nothing to change.
    """
    if not drop and not put:
        return raw
    text = raw.decode()
    members = list(_members(text))
    missing = [json.dumps(key) + ":" + json.dumps(value) for key, value in put.items() if key not in _keys(members)]
    if not missing and not any(member.key in drop or member.key in put for member in members):
        return raw
    kept = [member for member in members if member.key not in drop]
    parts: list[str] = []
    for member in kept:
        value = json.dumps(put[member.key]) if member.key in put else text[member.value : member.end]
        parts.append(_before(text, members, member) + text[member.begin : member.value] + value)
    tail = text[members[-1].end :] if members else text[_skip(text, 0) + 1 :]
    return (text[: _skip(text, 0)] + "{" + ",".join([*parts, *missing]) + tail).encode()


def _keys(members: Collection[_Member]) -> set[str]:
    return {member.key for member in members}


def _before(text: str, members: list[_Member], member: _Member) -> str:
    """The space between a member and the comma or brace before it."""
    at = member.begin
    while text[at - 1] in _SPACE:
        at -= 1
    return text[at : member.begin]


def _members(text: str) -> Iterator[_Member]:
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] != "}":
        begin = at
        key, at = scanstring(text, at + 1)
        value = _skip(text, _skip(text, at) + 1)
        _, end = _DECODER.raw_decode(text, value)
        yield _Member(key, begin, value, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at
