"""Whether a seal holds, found out by trying to break it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from controllers.sandbox.attempts import ATTEMPTS, ESCAPED, NOT_SEALED, REFUSED
from controllers.sandbox.seal import ALL_LAYERS, Layer


class SandboxLevel(StrEnum):
    """How a controller is held, loosest last but for those nobody has to hold."""

    SEALED = "sealed"  # by the kernel, proven
    OPEN = "open"  # not at all, by an operator's word
    REFUSED = "refused"  # it cannot be, so it does not run
    TRUSTED = "trusted"  # it came with the program

    @property
    def rank(self) -> int:
        """As a metric: 2 sealed, 1 open, 0 refused."""
        return {"sealed": 2, "open": 1}.get(self, 0)


class AttemptResult(NamedTuple):
    """How a child that tried something ended."""

    status: int  # its wait status
    words: str  # what it said before it ended, if it could


class Trial(NamedTuple):
    """An attempt, and what became of it."""

    what: str
    layers: Layer  # those the child wore
    held: bool
    words: str


@dataclass(frozen=True)
class Proof:
    """What was tried. With no trials at all, `reason` says why nothing could be."""

    trials: Sequence[Trial] = ()
    reason: str = ""

    @property
    def sealed(self) -> bool:
        """Whether every layer that is required holds, alone and together."""
        return bool(self.trials) and self.lacking is None

    @property
    def lacking(self) -> str | None:
        """What is wrong, in one line; None if nothing is."""
        if not self.trials:
            return self.reason or "nothing was tried"
        for trial in self.trials:
            if not trial.held:
                return f"{trial.what}: {trial.words}"
        return None

    def of(self, layer: Layer) -> list[Trial]:
        """The trials that are about one layer: those whose child wore nothing that takes over from it."""
        base = Layer.PRIVILEGES if layer is not Layer.PRIVILEGES else Layer(0)
        return [trial for trial in self.trials if trial.layers in (layer, layer | base)]

    @property
    def together(self) -> list[Trial]:
        """The trials against everything a controller is held by."""
        return [trial for trial in self.trials if trial.layers == ALL_LAYERS]


def prove(attempt: Callable[[int], AttemptResult]) -> Proof:
    """Make every attempt; `attempt` has a child make the one of that number. Raises what it raises."""
    return Proof(list(_trials(attempt)))


def _trials(attempt: Callable[[int], AttemptResult]) -> Iterator[Trial]:
    for number, (what, layers, _) in enumerate(ATTEMPTS):
        outcome = attempt(number)
        yield Trial(what, layers, *_judge(outcome))


def _judge(outcome: AttemptResult) -> tuple[bool, str]:
    if os.WIFSIGNALED(outcome.status):
        number = os.WTERMSIG(outcome.status)
        return number == signal.SIGSYS, f"killed by {signal.Signals(number).name}"
    code = os.waitstatus_to_exitcode(outcome.status)
    if code == REFUSED:
        return True, f"refused, {outcome.words}"
    if code == NOT_SEALED:
        return False, outcome.words
    return False, "it could" if code == ESCAPED else f"nothing is proven, {outcome.words or f'it left with {code}'}"
