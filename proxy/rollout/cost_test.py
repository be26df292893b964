"""Sequential test by betting of whether a controller costs far more than its calibration.

A request's cost is counted in chains: its tokens divided by the mean length of its finished branches. So prompts with
longer or shorter replies than in the calibration make no difference. If no branch finished, the chain length is the
calibration's or that of the longest branch, whichever is larger.

The null hypothesis is that a controller's mean cost, in chains, is at most the allowed cost at the request's β. The
allowed cost is MARGIN times the calibrated cost at that β, or half of the calibrated cost at the largest β, whichever
is larger. As in `canary_test.py`, the wealth of gamblers who bet against the hypothesis is an e-process. The
probability that it ever reaches 1/α is at most α.

Evidence is kept by tenant. One tenant's prompts may be unlike all others. So if there are several tenants, two of them
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
"""Allowed mean cost, as a multiple of the calibrated cost at the request's β."""
ALPHA: Final = 0.001
"""Maximum probability that the processes of a proxy ever quarantine a controller within its allowed cost for its cost.
Each gets a part."""
WARN_AT: Final = 10.0
"""E-value at which a warning is logged."""
LEAST_TOKENS: Final = 256
"""Tokens per request that are always allowed, because probes and the final answer have a fixed cost."""
TENANTS: Final = 1024
"""Maximum number of tenants per controller whose evidence is kept. The least recent tenant is dropped first."""


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
        """Record a request's cost.

        Return the evidence when it first reaches WARN_AT, and whenever it is proven. Otherwise return None.
        """
        by_model = self._calibrations.get(model)
        calibration = None if by_model is None else by_model.of_digest(spec.digest)
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
        proving_tenants = sum(tenant_process.e_value >= self._limit for tenant_process in tenants.values())
        is_proven = process.e_value >= self._limit and proving_tenants >= min(2, len(tenants))
        if not is_proven and (process.e_value < WARN_AT or spec.digest in self._warned):
            return None
        self._warned.add(spec.digest)
        return CostEvidence(process.e_value, process.bets, tokens / chain, allowed, is_proven)

    @property
    def digests(self) -> set[str]:
        """The controllers on which there is evidence."""
        return {*self._tenants, *self._warned}

    def has_warned(self, digest: str) -> bool:
        """Return whether there was a warning of a controller."""
        return digest in self._warned

    def forget(self, digest: str) -> None:
        """Forget the evidence on a controller whose quarantine was lifted, or that serves no longer."""
        self._tenants.pop(digest, None)
        self._warned.discard(digest)


def allowed_cost(calibration: Calibration, beta: float) -> float:
    """Return the allowed mean cost at `beta`, in chains."""
    betas = [point.beta for point in calibration.points]
    costs = [point.tokens for point in calibration.points]
    calibrated = float(np.interp(beta, betas, costs))
    return max(MARGIN * calibrated, costs[-1] / 2) / calibration.single.tokens


def chain_length(calibration: Calibration, state: State) -> float:
    """Return the length of a chain in an episode, in tokens."""
    ended: Sequence[int] = [state.branches[index].tokens for index in state.finished]
    if ended:
        return max(1.0, sum(ended) / len(ended))
    return max(calibration.single.tokens, *(float(branch.tokens) for branch in state.branches), 1.0)
