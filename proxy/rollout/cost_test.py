"""Whether a controller costs far more than it was calibrated to, found out by betting on it request by request.

A request's cost is counted in chains: its tokens by the length of a chain that ended in it. So prompts with longer or
shorter replies than those of the calibration make no difference. Where none ended, a chain is taken to be as long as
the calibration's, or as the longest branch if that is longer.

The null is that a controller's mean cost, in chains, is no more than allowed at the request's β: MARGIN times the
calibrated cost there, or half of its calibrated cost at the largest β, whichever is more. As in `watch.py`, the wealth
of gamblers who bet against it is an e-process: it ever reaches 1/α with probability at most α.

Wealth is kept by tenant. A single tenant's prompts may be unlike those of all others, so where there are several, two
of them must have the evidence.
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
"""Times the calibrated cost at a request's β that a controller may cost on average."""
ALPHA: Final = 0.001
"""How probable it may be that a controller which costs no more than allowed is ever quarantined for its cost."""
WARN_AT: Final = 10.0
"""Wealth at which an operator is warned."""
LEAST_TOKENS: Final = 256
"""Cost of a request, in tokens, that is always allowed: probes and the closing of a reply are as dear however short."""
TENANTS: Final = 1024
"""Tenants of one controller whose wealth is remembered, the latest ones."""


class CostEvidence(NamedTuple):
    """Evidence that a controller costs more than allowed."""

    wealth: float
    requests: int  # of the tenant whose request it was
    chains: float  # the cost of that request
    allowed: float  # chains
    is_proven: bool  # enough of it, by enough tenants

    def __str__(self) -> str:
        return (
            f"it costs more than it was calibrated to: e-value {self.wealth:.0f} after {self.requests} requests, "
            f"the last one {self.chains:.1f} chains where {self.allowed:.1f} are allowed"
        )


class CostTest:
    """The costs of calibrated controllers on their models."""

    def __init__(self, calibrations: Calibrations, alpha: float = ALPHA) -> None:
        self._calibrations = calibrations
        self._limit = 1 / alpha
        self._tenants: dict[str, OrderedDict[str, BettingProcess]] = {}  # by a controller's digest
        self._warned: set[str] = set()  # digests

    def observe(
        self, spec: Spec, model: str, tenant: str, beta: float, tokens: int, state: State
    ) -> CostEvidence | None:
        """Take notice of a request's cost; the evidence once it is worth a warning, and once it is proven."""
        first = self._calibrations.get(model)
        calibration = None if first is None else first.of_digest(spec.digest)
        if calibration is None or calibration.single.tokens <= 0:
            return None
        chain = chain_of(calibration, state)
        allowed = max(allowance(calibration, beta), LEAST_TOKENS / chain)
        tenants = self._tenants.setdefault(spec.digest, OrderedDict())
        gamblers = tenants.setdefault(tenant, BettingProcess())
        tenants.move_to_end(tenant)
        while len(tenants) > TENANTS:
            tenants.popitem(last=False)
        gamblers.settle(tokens / chain / allowed - 1)
        rich = sum(one.wealth >= self._limit for one in tenants.values())
        is_proven = gamblers.wealth >= self._limit and rich >= min(2, len(tenants))
        if not is_proven and (gamblers.wealth < WARN_AT or spec.digest in self._warned):
            return None
        self._warned.add(spec.digest)
        return CostEvidence(gamblers.wealth, gamblers.bets, tokens / chain, allowed, is_proven)

    def forget(self, digest: str) -> None:
        """Begin anew with a controller whose quarantine was lifted."""
        self._tenants.pop(digest, None)
        self._warned.discard(digest)


def allowance(calibration: Calibration, beta: float) -> float:
    """The mean cost that is allowed at `beta`, in chains."""
    betas = [point.beta for point in calibration.points]
    spent = [point.tokens for point in calibration.points]
    here = float(np.interp(beta, betas, spent))
    return max(MARGIN * here, spent[-1] / 2) / calibration.single.tokens


def chain_of(calibration: Calibration, state: State) -> float:
    """The length of a chain in an episode, in tokens."""
    ended: Sequence[int] = [state.branches[index].tokens for index in state.finished]
    if ended:
        return max(1.0, sum(ended) / len(ended))
    return max(calibration.single.tokens, *(float(branch.tokens) for branch in state.branches), 1.0)
