"""Branch: the facts that a state knows of one branch.

This module can be compiled (`controllers/core/compiled.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from controllers.core.action_types import Advanced, Probed
from controllers.signals import LOG_CONFIDENCE, confidence_of

_FIELDS: Final = (
    *("_log_probability", "_lowest", "_signalled", "finished", "intervals", "label"),
    *("probe_confidence", "probe_tokens", "probed", "pruned", "tokens"),
)


class Branch:
    """The known facts of one branch."""

    __slots__ = (*_FIELDS, "known_probe", "known_step")

    def __init__(self) -> None:
        # The latest facts that `State` has checked. Environments often reply with the same object again, which needs no
        # second check. Copies of a branch start without them.
        self.known_step: Advanced | None = None  # an advance that did not finish the branch and has no signals
        self.known_probe: Probed | None = None
        self.intervals = 0  # intervals run
        self.tokens = 0  # tokens generated, probes not counted
        self.probe_tokens = 0  # tokens its probes cost
        self.label: int | None = None  # final label if finished, else label of the latest probe
        self.probed = 0  # intervals it had run when it was last probed
        self.finished = False
        self.pruned = False
        self.probe_confidence: int | None = None  # confidence of its latest probe before its end, in per mille
        self._signalled = 0  # tokens whose signals are known
        self._log_probability = 0.0  # of them, in nats
        self._lowest: int | None = None  # confidence of the least confident window in them, in per mille

    # Signals are None if unknown, as they are to a controller that does not declare them.

    @property
    def log_probability(self) -> float | None:
        """Log probability of all its tokens, in nats, at most 0; None if that of a part is unknown."""
        return self._log_probability if self._signalled and self._signalled == self.tokens else None

    @property
    def lowest(self) -> int | None:
        """Confidence of its least confident window, in per mille; None if a part of the branch is unknown."""
        return self._lowest if self._signalled == self.tokens else None

    @property
    def confidence(self) -> int | None:
        """Geometric mean probability of its tokens, in per mille; None if unknown."""
        total = self.log_probability
        return None if total is None or not self.tokens else confidence_of(total / self.tokens)

    @property
    def active(self) -> bool:
        """Whether it is neither finished nor pruned."""
        return not (self.finished or self.pruned)

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, (Branch, (), {name: getattr(self, name) for name in _FIELDS})

    def __repr__(self) -> str:
        fate = "finished" if self.finished else "pruned" if self.pruned else "running"
        return f"<Branch {fate} intervals={self.intervals} tokens={self.tokens} label={self.label}>"

    def add_signals(self, fact: Advanced) -> None:
        """Add the signals of a fact whose confidence is known."""
        if fact.confidence is None or not fact.tokens:
            return
        self._signalled += fact.tokens
        self._log_probability += fact.tokens * LOG_CONFIDENCE[fact.confidence]
        if fact.lowest is not None:
            self._lowest = fact.lowest if self._lowest is None else min(self._lowest, fact.lowest)


def rebuild(kind: Callable[..., object], arguments: tuple[object, ...], fields: Mapping[str, object]) -> object:
    """Create a copy of an object from its fields: compiled classes have no other way to be copied and pickled."""
    copied = kind(*arguments)
    for name, value in fields.items():
        setattr(copied, name, value)
    return copied
