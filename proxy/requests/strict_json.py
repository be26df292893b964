"""Parse JSON request bodies strictly, so that every parser reads them alike, and within limits on their structure."""

from __future__ import annotations

import re
from typing import Any, Final

import jiter

from proxy.errors import BadRequest

MAX_MEMBERS: Final = 256
"""Maximum number of members of the body itself. The OpenAI client and vLLM together have about 150 fields."""
MAX_VALUES: Final = 200_000
"""Maximum number of objects, lists, members and strings in a body. Building more would delay other requests."""
MAX_DEPTH: Final = 200
"""Maximum nesting depth of a body. jiter refuses more."""

_DUPLICATE: Final = re.compile(r'duplicate key "(.*)" at line', re.DOTALL)


def read_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`, which must be UTF-8.

    Raises BadRequest if it is anything else, contains NaN or a duplicate key, or has too much structure.
    """
    _check_structure(raw)
    try:
        body = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True)  # parsers differ on duplicates
    except ValueError as error:
        raise BadRequest(_describe(str(error)), code="bad_json") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="bad_json")
    if len(body) > MAX_MEMBERS:
        raise _too_complex(f"the body has {len(body)} fields; at most {MAX_MEMBERS} are accepted")
    return body


def _check_structure(raw: bytes) -> None:
    """Raise BadRequest if `raw` has too many values, without building any of them.

    Brackets, colons and quotes are first counted everywhere, also inside strings. That count is never too low. Only if
    it exceeds the limit, the strings are removed and the rest is counted again.
    """
    if len(raw) <= MAX_VALUES or _count(raw) + raw.count(b'"') // 2 <= MAX_VALUES:
        return
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    values = plain.count(b'"') // 2
    if values <= MAX_VALUES:
        values += _count(b"".join(plain.split(b'"')[::2]))
    if values > MAX_VALUES:
        count = f"at least {values} objects, lists, members and strings"
        raise _too_complex(f"the body has {count}; at most {MAX_VALUES} are accepted; split it into several requests")


def _count(text: bytes) -> int:
    """Return the number of objects, lists and members that begin in `text`."""
    return text.count(b"{") + text.count(b"[") + text.count(b":")


def _too_complex(message: str) -> BadRequest:
    return BadRequest(message, code="body_too_complex")


def _describe(error: str) -> str:
    """Return the message to clients for a jiter error."""
    if duplicate := _DUPLICATE.search(error):
        return f"the body has an object with the duplicate key {duplicate[1]!r}; send each key once"
    if "recursion limit" in error:
        return f"the body is nested more than {MAX_DEPTH} levels deep; flatten it"
    if "number out of range" in error:
        return f"the body has a number with too many digits: {error}"
    return f"the body is not valid JSON: {error}"
