"""Signals of one request's branches and probes, computed from the log-probabilities of their tokens.

The signals of an interval depend on its own tokens only. So they are the same however many requests generated it, and
whether it was generated ahead. A fact of several intervals combines theirs, as replay does.
"""

from __future__ import annotations

from collections.abc import Sequence

from controllers.signals import answer_confidence, combine, interval_signals
from proxy.probe_templates import Template
from proxy.types import IntervalSignals, LiveBranch, Output

UNKNOWN = IntervalSignals(None, None)


def signals_by_interval(branch: LiveBranch, interval: int, tokens: int) -> list[IntervalSignals]:
    """Return the signals of each interval in a branch's first `tokens` tokens. The last interval may be shorter.

    Those of whole intervals are computed once, and kept with the branch.
    """
    full = tokens // interval
    known = branch.interval_signals
    while len(known) < full:
        start = len(known) * interval
        known.append(_signals(branch, start, start + interval))
    rest = [_signals(branch, full * interval, tokens)] if tokens > full * interval else []
    return known[:full] + rest


def fact_signals(branch: LiveBranch, interval: int, start: int, end: int) -> IntervalSignals:
    """Return the signals of a branch's tokens from `start`, the start of an interval, to `end`."""
    first = start // interval
    if start % interval or start >= end:
        return UNKNOWN
    parts = signals_by_interval(branch, interval, end)[first:]
    lengths = (min(interval, end - at) for at in range(start, end, interval))
    return IntervalSignals(*combine((length, *part) for length, part in zip(lengths, parts, strict=True)))


def probe_confidence(output: Output, template: Template) -> int | None:
    """Return the confidence of the answer in a probe's output. None if it is unknown or the answer has no end.

    The answer's tokens are those before the closing brace. A token with the brace counts if it also has the end of the
    answer, such as `4}`. Braces are found in the texts of the single tokens, which the server sends.
    """
    length = _answer_length(output.token_texts, template)
    return None if length is None else answer_confidence(output.log_probabilities[:length])


def _answer_length(texts: Sequence[str], template: Template) -> int | None:
    """Return how many tokens of a probe's output belong to its answer; None if no brace closes it."""
    before = ""
    for index, text in enumerate(texts):
        if template.answered(before + text) is not None:
            in_answer = next(at for at in range(len(text)) if template.answered(before + text[: at + 1]) is not None)
            return index + bool(text[:in_answer].strip())
        before += text
    return None


def _signals(branch: LiveBranch, start: int, end: int) -> IntervalSignals:
    values = branch.log_probabilities[start:end]
    return IntervalSignals(*interval_signals(values)) if len(values) == end - start else UNKNOWN
