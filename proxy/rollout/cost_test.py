"""A sequential test of whether a controller costs far more than its calibration: bets on each request.

A request's cost is counted in chains: its tokens divided by the mean length of the branches that ended in it. So
prompts with longer or shorter replies than those of the calibration make no difference. If no branch ended, the length
is the calibration's, or that of the longest branch if it is longer.

The null hypothesis is that a controller's mean cost, in chains, is at most the allowed cost at the request's β: MARGIN
times the calibrated cost there, or half of the calibrated cost at the largest β, whichever is more. As in
`canary_test.py`, the wealth of gamblers who bet against it is an e-process: it ever reaches 1/α with probability
at most α.

Evidence is kept by tenant. One tenant's prompts may be unlike all others, so if there are several tenants, two of them
must provide enough evidence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from controllers import State
from controllers.loading import Spec
from discovery.evaluation.calibration import Calibration, Calibrations
from proxy.rollout.canary_test import BettingProcess

MARGIN: Final = 4.0
"""How many times the calibrated cost at a request's β a controller may cost on average."""
ALPHA: Final = 0.001
"""Largest probability that a controller within its allowed cost is ever quarantined for its cost."""
WARN_AT: Final = 10.0
"""E-value at which a warning is logged."""
LEAST_TOKENS: Final = 256
"""Tokens per request that are always allowed, because probes and the final answer have a fixed cost."""
TENANTS: Final = 1024
"""Most tenants per controller whose evidence is kept; the latest ones."""


class CostEvidence(NamedTuple):
    """Evidence that a controller costs more than allowed."""

    e_value: float
    requests: int  # of the tenant of the latest request
    chains: float  # cost of the latest request
    allowed: float  # cost in chains
    is_proven: bool  # enough evidence from enough tenants

    def __str__(self) -> str:
        return (
            f"it costs more than its calibration allows: e-value {self.e_value:.0f} after {self.requests} requests, "
            f"the last one cost {self.chains:.1f} chains; {self.allowed:.1f} are allowed"
        )


class CostTest:
    """The test of every calibrated controller."""

    def __init__(self, calibrations: Calibrations, alpha: float = ALPHA) -> None:
        self._calibrations = calibrations
        self._limit = 1 / alpha
        self._tenants: dict[str, OrderedDict[str, BettingProcess]] = {}  # by a controller's digest
        self._warned: set[str] = set()  # digests

    def observe(
        self, spec: Spec, model: str, tenant: str, beta: float, tokens: int, state: State
    ) -> CostEvidence | None:
        """Record a request's cost. Return the evidence when it first deserves a warning, and whenever it is proven."""
        first = self._calibrations.get(model)
        calibration = None if first is None else first.of_digest(spec.digest)
        if calibration is None or calibration.single.tokens <= 0:
            return None
        chain = chain_length(calibration, state)
        allowed = max(allowed_cost(calibration, beta), LEAST_TOKENS / chain)
        tenants = self._tenants.setdefault(spec.digest, OrderedDict())
        process = tenants.setdefault(tenant, BettingProcess())
        tenants.move_to_end(tenant)
        while len(tenants) > TENANTS:
            tenants.popitem(last=False)
        process.settle(tokens / chain / allowed - 1)
        proven = sum(known.e_value >= self._limit for known in tenants.values())
        is_proven = process.e_value >= self._limit and proven >= min(2, len(tenants))
        if not is_proven and (process.e_value < WARN_AT or spec.digest in self._warned):
            return None
        self._warned.add(spec.digest)
        return CostEvidence(process.e_value, process.bets, tokens / chain, allowed, is_proven)

    def forget(self, digest: str) -> None:
        """Start anew with a controller whose quarantine was lifted."""
        self._tenants.pop(digest, None)
        self._warned.discard(digest)


def allowed_cost(calibration: Calibration, beta: float) -> float:
    """Return the allowed mean cost at `beta`, in chains."""
    betas = [point.beta for point in calibration.points]
    spent = [point.tokens for point in calibration.points]
    here = float(np.interp(beta, betas, spent))
    return max(MARGIN * here, spent[-1] / 2) / calibration.single.tokens


def chain_length(calibration: Calibration, state: State) -> float:
    """Return the length of a chain in an episode, in tokens."""
    ended: Sequence[int] = [state.branches[index].tokens for index in state.finished]
    if ended:
        return max(1.0, sum(ended) / len(ended))
    return max(calibration.single.tokens, *(float(branch.tokens) for branch in state.branches), 1.0)
