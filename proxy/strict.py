"""JSON objects that mean the same to everybody who reads them."""

from __future__ import annotations

from typing import Any

import jiter

from proxy.errors import BadRequest


def read(raw: bytes) -> dict[str, Any]:
    """The object `raw` is in UTF-8. Raises BadRequest, also for NaN, two equal keys and what is nested 200 deep."""
    try:
        body = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True)  # readers differ in which they take
    except ValueError as error:
        if "duplicate key" in str(error):
            raise BadRequest("an object of the body has the same key twice", code="bad_json") from None
        raise BadRequest(f"the body is not JSON: {error}", code="bad_json") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="bad_json")
    return body
