"""Canonical text of JSON values: equal values have equal texts, however their keys are ordered or numbers written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import jiter

MAX_FIELDS: Final = 10_000
"""Maximum number of fields of a value that are compared one by one. A value with more is compared in one piece."""

_NUMBER: Final = re.compile(r"(-?)(\d+)(?:\.(\d+))?(?:[eE]([-+]?\d{1,15}))?")


class InvalidJson(ValueError):
    """A text is not one JSON value that every parser would read alike."""


def parse_json(text: str) -> Any:
    """Return the JSON value that `text` consists of. Fractions keep the digits they were written with.

    Raises InvalidJson, also for duplicate keys, NaN, more than 200 levels and integers of more than 4,300 digits.
    """
    try:
        return jiter.from_json(
            text.encode(), allow_inf_nan=False, catch_duplicate_keys=True, float_mode="lossless-float"
        )
    except ValueError as error:  # a lone surrogate in the text is one too
        raise InvalidJson(str(error)) from None


def canonical_text(value: Any) -> str:
    """Return the canonical text of a parsed value. It depends neither on key order nor on how numbers are written."""
    parts: list[str] = []
    _append(value, parts)
    return "".join(parts)


def _append(value: Any, parts: list[str]) -> None:
    """Append the canonical text of `value`, in pieces."""
    if isinstance(value, dict):
        parts.append("{")
        for key in sorted(value):
            parts.append(f"{json.dumps(key, ensure_ascii=False)}:")
            _append(value[key], parts)
            parts.append(",")
        parts.append("}")
    elif isinstance(value, list):
        parts.append("[")
        for member in value:
            _append(member, parts)
            parts.append(",")
        parts.append("]")
    elif value is None or isinstance(value, bool | str):
        parts.append(json.dumps(value, ensure_ascii=False))
    else:
        parts.append(_canonical_number(str(value)))


def _canonical_number(written: str) -> str:
    """Return digits and exponent of a number, without zeros that do not matter: 1.50 and 15E-1 are both `15e-1`."""
    parts = _NUMBER.fullmatch(written)
    if parts is None:  # an exponent beyond any use
        return written.lower()
    sign, whole_digits, fraction, exponent = parts.groups(default="")
    digits = (whole_digits + fraction).lstrip("0")
    significant = digits.rstrip("0")
    if not significant:
        return "0"
    power = int(exponent or 0) - len(fraction) + len(digits) - len(significant)
    return f"{sign}{significant}e{power}"


def fields_of(value: Any) -> Mapping[str, str]:
    """Return the canonical text of each field of a value, by its JSON Pointer (RFC 6901).

    Objects are split into their members. Lists, and objects without members, are fields in one piece. A value that is
    no object, or has too many fields, is one field with an empty pointer.
    """
    fields: dict[str, str] = {}
    waiting = [("", value)]
    while waiting:
        pointer, member = waiting.pop()
        if isinstance(member, dict) and member:
            waiting += [(f"{pointer}/{_escaped(key)}", member[key]) for key in sorted(member, reverse=True)]
        else:
            fields[pointer] = canonical_text(member)
        if len(fields) + len(waiting) > MAX_FIELDS:
            return {"": canonical_text(value)}
    return fields


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
