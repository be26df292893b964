"""Read JSON objects that every reader understands the same way, within bounds on their structure."""

from __future__ import annotations

import re
from typing import Any, Final

import jiter

from proxy.errors import BadRequest

MOST_MEMBERS: Final = 256
"""Members of the body itself. All fields of the OpenAI client and of vLLM together are about 150."""
MOST_VALUES: Final = 200_000
"""Objects, lists, members and strings of a body. Building more of them would hold up every other request."""
MOST_DEPTH: Final = 200
"""Levels a body may be nested; jiter refuses more."""

_DUPLICATE: Final = re.compile(r'duplicate key "(.*)" at line', re.DOTALL)


def read(raw: bytes) -> dict[str, Any]:
    """Return the JSON object `raw`, which must be UTF-8.

    Raises BadRequest for anything else, for NaN, for an object with the same key twice, and for too much structure.
    """
    _check_structure(raw)
    try:
        body = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True)  # readers differ in which they take
    except ValueError as error:
        raise BadRequest(_problem(str(error)), code="bad_json") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="bad_json")
    if len(body) > MOST_MEMBERS:
        raise _too_complex(f"the body has {len(body)} fields; at most {MOST_MEMBERS} are accepted")
    return body


def _check_structure(raw: bytes) -> None:
    """Raise BadRequest if `raw` has too many values, without building any of them.

    Brackets, colons and quotes are counted first wherever they stand, also within texts, which is never too few. Only
    if that is too many are the texts left out and the rest counted again.
    """
    if len(raw) <= MOST_VALUES or _count(raw) + raw.count(b'"') // 2 <= MOST_VALUES:
        return
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    values = plain.count(b'"') // 2
    if values <= MOST_VALUES:
        values += _count(b"".join(plain.split(b'"')[::2]))
    if values > MOST_VALUES:
        least = f"{values} or more objects, lists, members and strings"
        raise _too_complex(f"the body has {least}; at most {MOST_VALUES} are accepted; send it in several requests")


def _count(text: bytes) -> int:
    """Return how many objects, lists and members begin in `text`."""
    return text.count(b"{") + text.count(b"[") + text.count(b":")


def _too_complex(message: str) -> BadRequest:
    return BadRequest(message, code="body_too_complex")


def _problem(message: str) -> str:
    if duplicate := _DUPLICATE.search(message):
        return f"an object of the body has the key {duplicate[1]!r} twice"
    if "recursion limit" in message:
        return f"the body is nested more than {MOST_DEPTH} levels deep"
    if "number out of range" in message:
        return f"the body has a number of too many digits: {message}"
    return f"the body is not JSON: {message}"
