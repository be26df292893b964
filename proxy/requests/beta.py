"""Where a request's β comes from: the first present of header, body, reasoning effort, model alias, server default.

The body says it as `tts.beta`, or as `tts.target_tokens`, from which a calibration tells β. Both in one body contradict
each other and are refused; a header, which gateways set, wins over either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from controllers.dial import parse_beta
from controllers.errors import BetaError
from proxy.errors import BadRequest
from proxy.types import BetaSource, EffectiveBeta

HEADER: Final = "x-tts-beta"

NO_EFFORT: Final = "none"
"""The `reasoning_effort` that asks for an answer without a thought. Where it sets β, one branch answers."""

EFFORTS: Final[Mapping[str, float]] = MappingProxyType(
    {NO_EFFORT: 0.0, "minimal": 0.0, "low": 0.25, "medium": 0.5, "high": 0.75, "xhigh": 1.0, "max": 1.0}
)
"""What `reasoning_effort` means as β, for models that do not read it themselves."""

READS_EFFORT: Final = ("gpt-oss",)
"""Parts of the names of models whose chat template reads `reasoning_effort`; it then sets no β."""


def _parse(text: str, param: str) -> float:
    """β from client text. Raises BadRequest naming `param`."""
    try:
        return parse_beta(text, param)
    except BetaError as error:
        raise BadRequest(str(error), param=param, code="bad_beta") from None


def split_alias(model: str) -> tuple[str, float | None]:
    """Split `name@0.5` into a model and its β, which is None without a number behind an `@`. Raises BadRequest."""
    name, at, beta = model.rpartition("@")
    return (name, _parse(beta, "model")) if at and _is_number(beta) else (model, None)


def _is_number(text: str) -> bool:
    """Whether a text is meant as a number, however wrong it may be as a β."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def alias(card: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """A model of the upstream's list under the name that sets `beta`."""
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
    """The effective β, or None if there is none. `headers` are all values of the header. Raises BadRequest.

    `target` finds the β of the tokens aimed at, and is asked only where it decides.
    """
    if len(headers) > 1:
        raise BadRequest(f"{HEADER} is given {len(headers)} times; send it once", param=HEADER, code="bad_beta")
    if headers:
        return EffectiveBeta(_parse(headers[0], HEADER), BetaSource.HEADER)
    if body is not None and target is not None:
        words = "tts.beta and tts.target_tokens both set β; send one of them"
        raise BadRequest(words, param="tts.target_tokens", code="bad_beta")
    if body is not None:
        return EffectiveBeta(body, BetaSource.BODY)
    if target is not None:
        return EffectiveBeta(target(), BetaSource.TARGET)
    if effort is not None and effort in EFFORTS and not any(name in model.lower() for name in READS_EFFORT):
        return EffectiveBeta(EFFORTS[effort], BetaSource.EFFORT)
    if alias is not None:
        return EffectiveBeta(alias, BetaSource.ALIAS)
    return None if default is None else EffectiveBeta(default, BetaSource.DEFAULT)
