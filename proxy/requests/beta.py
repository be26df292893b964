"""Resolve a request's β from its header, body, reasoning effort, model alias or the server's default, in that order.

The body sets β as `tts.beta`, or as `tts.target_tokens`, which a calibration converts to β. A body with both is
refused. The header overrides the body, because gateways set it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from controllers.dial import parse_beta
from controllers.errors import BetaError
from proxy.errors import BadRequest, clipped
from proxy.types import BetaSource, EffectiveBeta

HEADER: Final = "x-tts-beta"
_HEADER_NAME: Final = HEADER.encode()

HEADER_PREFIX: Final = b"x-tts-"
"""Prefix of the proxy's headers. Of these, requests may only send HEADER."""

_MISSPELT: Final = frozenset({b"ttsbeta", b"xttsbeta", b"xbeta", b"autottsbeta", b"xautottsbeta"})
"""Names of headers, without - and _, that mean HEADER."""

NO_EFFORT: Final = "none"
"""The `reasoning_effort` that asks for an answer without reasoning. If it sets β, a single branch answers."""

EFFORTS: Final[Mapping[str, float]] = MappingProxyType(
    {NO_EFFORT: 0.0, "minimal": 0.0, "low": 0.25, "medium": 0.5, "high": 0.75, "xhigh": 1.0, "max": 1.0}
)
"""The β of each `reasoning_effort`, for models whose chat template does not read it."""

READS_EFFORT: Final = ("gpt-oss",)
"""Substrings of the names of models whose chat template reads `reasoning_effort`. For these it does not set β."""


def _parse(text: str, param: str, name: str | None = None) -> float:
    """Return the β in a client's text. Raises BadRequest about `param`, which the message calls `name`."""
    try:
        return parse_beta(text, name or param)
    except BetaError as error:
        raise BadRequest(str(error), param=param, code="bad_beta") from None


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise BadRequest for a header of a request that would be ignored, such as a misspelt one."""
    for name, _ in headers:
        if name != _HEADER_NAME and (name.startswith(HEADER_PREFIX) or (b"beta" in name and _is_misspelt(name))):
            shown = clipped(name.decode("latin-1"), 80)
            message = f"{shown}: there is no such header; send {HEADER}, or other options in the body's object tts"
            raise BadRequest(message, param=shown, code="unknown_header")


def _is_misspelt(name: bytes) -> bool:
    return name.translate(None, b"-_") in _MISSPELT


def split_alias(model: str) -> tuple[str, float | None]:
    """Split `name@0.5` into a model and its β, or None if no number follows an `@`. Raises BadRequest."""
    name, at, beta = model.rpartition("@")
    if not at or not _is_number(beta):
        return model, None
    return name, _parse(beta, "model", "the β after @ in the model's name")


def _is_number(text: str) -> bool:
    """Return whether `text` is a number, even if it is not a valid β."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def alias_card(card: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """Return a copy of an upstream's model card under the alias that sets `beta`."""
    return {**card, "id": f"{card['id']}@{beta:g}", "parent": card["id"]}


def resolve(
    headers: Sequence[str],
    *,
    body: float | None,
    effort: str | None,
    alias: float | None,
    model: str,
    default: float | None,
    target: Callable[[], float] | None = None,
) -> EffectiveBeta | None:
    """Return the effective β, or None if there is none. Raises BadRequest.

    `headers` are all values of the header. `target` returns the β for `tts.target_tokens`. It is called only if no
    header overrides it.
    """
    if len(headers) > 1:
        raise BadRequest(f"header {HEADER} is sent {len(headers)} times; send it once", param=HEADER, code="bad_beta")
    if headers:
        return EffectiveBeta(_parse(headers[0], HEADER), BetaSource.HEADER)
    if body is not None and target is not None:
        message = "tts.beta and tts.target_tokens both set β; send only one of them"
        raise BadRequest(message, param="tts.target_tokens", code="bad_beta")
    if body is not None:
        return EffectiveBeta(body, BetaSource.BODY)
    if target is not None:
        return EffectiveBeta(target(), BetaSource.TARGET)
    if effort is not None and effort in EFFORTS and not any(name in model.lower() for name in READS_EFFORT):
        return EffectiveBeta(EFFORTS[effort], BetaSource.EFFORT)
    if alias is not None:
        return EffectiveBeta(alias, BetaSource.ALIAS)
    return None if default is None else EffectiveBeta(default, BetaSource.DEFAULT)
