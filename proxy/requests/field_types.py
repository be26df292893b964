"""Annotated types of request fields. Limits on their length are checked before pydantic builds their items."""

from __future__ import annotations

from collections.abc import Sized
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field

MAX_MESSAGES: Final = 10_000
"""Maximum number of messages in a conversation, and of items in a Responses request's `input`."""
MAX_BIASES: Final = 1024
"""Maximum number of tokens in `logit_bias`, as in vLLM's sampler."""
MAX_OPTIONS: Final = 64
"""Maximum number of members in each options object, such as `tts`."""
MAX_NAME: Final = 512
"""Maximum number of characters in a name, such as the model's."""
_MAX_STOPS: Final = 64
"""Maximum number of stop strings. Up to four are sent to the upstream; the proxy itself searches for more."""


def at_most(limit: int, unit: str) -> BeforeValidator:
    """Return a validator that refuses lists and objects longer than `limit` before pydantic builds their items.

    Strings are bounded only if `unit` is "characters".
    """

    bounded: tuple[type[Sized], ...] = (str,) if unit == "characters" else (list, dict)

    def check(value: object) -> object:
        if isinstance(value, bounded) and len(value) > limit:
            raise ValueError(f"at most {limit} {unit} are accepted, not {len(value)}")
        return value

    return BeforeValidator(check)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _none_if_unset(seed: int) -> int | None:
    """Return the seed, or None for -1, by which vLLM means no seed."""
    return None if seed == -1 else seed


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
PositiveInt32 = Annotated[int, Field(ge=1, le=2**31, strict=True)]
TokenCount = Annotated[int, Field(ge=1, lt=2**63)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Seed = Annotated[Int64, AfterValidator(_none_if_unset)]
Name = Annotated[str, Field(max_length=MAX_NAME), at_most(MAX_NAME, "characters")]
TokenId = Annotated[str, Field(max_length=32), AfterValidator(lambda text: str(int(text)))]
_Bias = Annotated[float, Field(allow_inf_nan=False)]
Biases = Annotated[dict[TokenId, _Bias], Field(max_length=MAX_BIASES), at_most(MAX_BIASES, "tokens")]
Options = Annotated[dict[str, Any], Field(max_length=MAX_OPTIONS), at_most(MAX_OPTIONS, "members")]
Messages = Annotated[
    list[dict[str, Any]], Field(max_length=MAX_MESSAGES, fail_fast=True), at_most(MAX_MESSAGES, "messages")
]
_StopList = Annotated[list[str], Field(max_length=_MAX_STOPS), at_most(_MAX_STOPS, "strings")]
Stops = Annotated[_StopList, BeforeValidator(_as_list, json_schema_input_type=str | _StopList)]
