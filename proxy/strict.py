"""JSON objects that mean the same to everybody who reads them."""

from __future__ import annotations

import json
from typing import Any

import pydantic_core

from proxy.errors import BadRequest


def read(raw: bytes) -> dict[str, Any]:
    """The object `raw` is in UTF-8. Raises BadRequest, also for NaN, two equal keys and what is nested 200 deep."""
    try:
        body = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}", code="bad_json") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="bad_json")
    json.loads(raw, object_pairs_hook=_unique)  # readers differ in which of two equal keys they take
    return body


def _unique(pairs: list[tuple[str, Any]]) -> None:
    keys = set()
    for key, _ in pairs:
        if key in keys:
            raise BadRequest("an object of the body has the same key twice", code="bad_json")
        keys.add(key)
