"""Headers by which an inference gateway in front of vLLM orders requests, from callers that may set them.

They are those of the Gateway API Inference Extension, which llm-d and others implement. They are sent with every call
to the upstream that a request makes, but not with calls after its answer has gone out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Final

from proxy.errors import BadRequest

NAMES: Final = ("x-gateway-inference-objective", "x-gateway-inference-fairness-id")
MAX_CHARS: Final = 256
"""Maximum length of a value."""
_current: ContextVar[Mapping[str, str]] = ContextVar("gateway headers", default=MappingProxyType({}))


def gateway_headers() -> Mapping[str, str]:
    """Return the headers of the request that this task serves."""
    return _current.get()


def keep_gateway_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Keep the headers of a request for the current task and those that it starts. Raises BadRequest."""
    kept: dict[str, str] = {}
    for name, value in headers:
        if (known := name.decode("latin-1")) in NAMES:
            if known in kept or len(value) > MAX_CHARS or not all(0x20 <= byte < 0x7F for byte in value):
                raise BadRequest(
                    f"{known}: send one value of at most {MAX_CHARS} printable ASCII characters",
                    param=known,
                    code="bad_header",
                )
            kept[known] = value.decode("ascii")
    if kept:
        _current.set(kept)
