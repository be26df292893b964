"""Proof that the sandbox works: sandbox processes try to break out."""

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
    """How a controller is isolated."""

    SEALED = "sealed"  # isolated by the kernel, and proven
    OPEN = "open"  # not isolated, because the operator allowed it
    REFUSED = "refused"  # it cannot be isolated, so it does not run
    TRUSTED = "trusted"  # built in, so it needs no isolation

    @property
    def rank(self) -> int:
        """Value for metrics: 2 sealed, 1 open, 0 refused."""
        return {"sealed": 2, "open": 1}.get(self, 0)


class AttemptResult(NamedTuple):
    """How a process that tried to break out ended."""

    status: int  # wait status
    message: str  # sent before it ended; empty if it could not send any


class Trial(NamedTuple):
    """An attempt to break out, and its result."""

    what: str
    layers: Layer  # applied to the process
    held: bool
    message: str


@dataclass(frozen=True)
class Proof:
    """The trials made. Without trials, `reason` says why none could be made."""

    trials: Sequence[Trial] = ()
    reason: str = ""

    @property
    def sealed(self) -> bool:
        """Whether every required layer refused its attempts, alone and together with the others."""
        return bool(self.trials) and self.lacking is None

    @property
    def lacking(self) -> str | None:
        """Description of the first failure in one line; None if there is none."""
        if not self.trials:
            return self.reason or "no attempt was made"
        for trial in self.trials:
            if not trial.held:
                return f"{trial.what}: {trial.message}"
        return None

    def of(self, layer: Layer) -> list[Trial]:
        """Return the trials of a layer alone, in which no other layer could have refused the attempt."""
        base = Layer.PRIVILEGES if layer is not Layer.PRIVILEGES else Layer(0)
        return [trial for trial in self.trials if trial.layers in (layer, layer | base)]

    @property
    def together(self) -> list[Trial]:
        """Trials with all layers applied, as for a controller."""
        return [trial for trial in self.trials if trial.layers == ALL_LAYERS]


def prove(attempt: Callable[[int], AttemptResult]) -> Proof:
    """Run every attempt. `attempt` runs the one with the given number in a process; its errors are propagated."""
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
        return True, f"refused, {outcome.message}"
    if code == NOT_SEALED:
        return False, outcome.message
    if code == ESCAPED:
        return False, "the attempt succeeded"
    return False, f"inconclusive, {outcome.message or f'exit status {code}'}"
