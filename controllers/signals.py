"""Signals: how sure the model was of the tokens it generated, as whole numbers that facts carry.

A confidence is the geometric mean probability of some tokens, in per mille. Let ℓ be the mean of their
log-probabilities in nats. The confidence is round(1000 · exp(ℓ)), from 0 to 1000. None means that it is unknown. A
controller gets signals only if it declares them:

    class Mine:
        signals = ("intervals", "probes")

Signals are computed for each interval and rounded, before intervals are combined. So a fact of several intervals has
the same signals live and in replay, however many requests generated it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

MAX_CONFIDENCE: Final = 1000
"""Confidence of tokens that were certain, in per mille."""
_VALUES: Final = MAX_CONFIDENCE + 2  # of a signal, None included
WINDOW: Final = 16
"""Tokens of a window of which `lowest` is the least confident."""
LOG_CONFIDENCE: Final[Sequence[float]] = tuple(
    math.log(max(confidence, 0.25) / MAX_CONFIDENCE) for confidence in range(MAX_CONFIDENCE + 1)
)
"""Mean log-probability in nats by confidence; 0 counts as one quarter per mille, so that it rounds to 0 again."""


class Signal(StrEnum):
    """Signals that a controller may declare. Each costs the upstream work for log-probabilities."""

    INTERVALS = "intervals"  # of generated tokens: `Advanced.confidence` and `Advanced.lowest`
    PROBES = "probes"  # of the answers to probes: `Probed.confidence`


NO_SIGNALS: Final[frozenset[Signal]] = frozenset()
ALL_SIGNALS: Final = frozenset(Signal)


def parse_signals(names: Iterable[object]) -> frozenset[Signal]:
    """Return the signals with these names. Raises ValueError, which lists the existing ones."""
    signals = set()
    for name in names:
        if not isinstance(name, str) or name not in tuple(Signal):
            raise ValueError(f"{name!r} is not a signal; there are {', '.join(repr(str(signal)) for signal in Signal)}")
        signals.add(Signal(name))
    return frozenset(signals)


def pack_signals(confidence: int | None, lowest: int | None) -> int:
    """Return two signals as one number, from 0 if both are unknown to about a million."""
    if confidence is None and lowest is None:
        return 0
    return (0 if confidence is None else confidence + 1) * _VALUES + (0 if lowest is None else lowest + 1)


def unpack_signals(number: int) -> tuple[int | None, int | None]:
    """Return the signals that `pack_signals` packed. Raises ValueError."""
    if not number:
        return None, None
    if not 0 < number < _VALUES * _VALUES:
        raise ValueError(f"{number} does not encode signals")
    confidence, lowest = divmod(number, _VALUES)
    return confidence - 1 if confidence else None, lowest - 1 if lowest else None


def confidence_of(mean_log_probability: float) -> int:
    """Return the confidence of tokens with a mean log-probability in nats."""
    return round(MAX_CONFIDENCE * math.exp(min(0.0, mean_log_probability)))


def answer_confidence(log_probabilities: Sequence[float | None]) -> int | None:
    """Return the confidence of tokens by their log-probabilities; None if there are none or one is unknown."""
    known = [value for value in log_probabilities if value is not None and not math.isnan(value)]
    if not known or len(known) != len(log_probabilities):
        return None
    return confidence_of(math.fsum(known) / len(known))


def interval_signals(log_probabilities: Sequence[float | None]) -> tuple[int | None, int | None]:
    """Return the confidence of one interval's tokens, and that of its least confident window.

    Windows have `WINDOW` consecutive tokens; a shorter interval is one window. Both are None if there are no tokens or
    a log-probability is unknown.
    """
    confidence = answer_confidence(log_probabilities)
    if confidence is None:
        return None, None
    values = [float(value) for value in log_probabilities if value is not None]
    width = min(WINDOW, len(values))
    windows = (math.fsum(values[start : start + width]) / width for start in range(len(values) - width + 1))
    return confidence, confidence_of(min(windows))


def combine(intervals: Iterable[tuple[int, int | None, int | None]]) -> tuple[int | None, int | None]:
    """Return the confidence and the lowest window of consecutive intervals: (tokens, confidence, lowest) of each.

    Intervals without tokens do not count. Both are None if there are no others or a signal of one is unknown.
    """
    total, tokens, least = 0.0, 0, MAX_CONFIDENCE
    for length, confidence, lowest in intervals:
        if not length:
            continue
        if confidence is None or lowest is None:
            return None, None
        total += length * LOG_CONFIDENCE[confidence]
        tokens += length
        least = min(least, lowest)
    return (confidence_of(total / tokens), least) if tokens else (None, None)
