"""Successive halving over branch orders, and checks of the kernel against controller files.

Candidates are tried under few orders first, and those that pass under the orders that follow. Each trial keeps the best
third of all that have reached it so far, as asynchronous successive halving does (ASHA, arXiv 1810.05934). Of several
with equal scores in every trial, the first alone gets to the last. All candidates get the same orders, so that chance
favours none. The questions stay the same, because a part of them is easier or harder than the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple

from discovery.search.trial_pool import PendingTrial, TrialSettings, describe_failures

if TYPE_CHECKING:
    from discovery.search.cascade import CandidateVerdict

KEPT: Final = 3
"""One in so many candidates passes a trial."""
ALWAYS_KEPT: Final = 8
"""A candidate that is among so many best passes in any case, so that the first candidates are not dropped by chance."""
RUNGS: Final = (2, 8, 32)
"""Branch orders of the trials before the last."""
FEWEST_ORDERS: Final = 8
MOST_ORDERS: Final = 100
"""Bounds of the branch orders of the last trial. A search under fewer is too short for successive halving."""
EPISODES_PER_BETA: Final = 12_000
"""Episodes at one β that the branch orders of the last trial should make together."""

log = logging.getLogger(__name__)


def last_orders(questions: int) -> int:
    """Return the branch orders of the last trial: fewer if there are many questions, which average chance out too."""
    return min(MOST_ORDERS, max(FEWEST_ORDERS, EPISODES_PER_BETA // max(1, questions)))


def rungs_below(orders: int) -> tuple[int, ...]:
    """Return the branch orders of the trials before one under `orders`."""
    return tuple(rung for rung in RUNGS if rung < orders)


class Rung(NamedTuple):
    """A trial that one in `KEPT` candidates passes, and `ALWAYS_KEPT` at least."""

    trial: TrialSettings
    number: int  # of the rung

    def reached(self, verdict: CandidateVerdict) -> float | None:
        """Return the score of a verdict in this trial; None if it was not reached."""
        return verdict.rungs[self.number] if len(verdict.rungs) > self.number else None

    def noted(self, verdict: CandidateVerdict, score: float) -> CandidateVerdict:
        """Return the verdict with a score in this trial."""
        return replace(verdict, rungs=(*verdict.rungs, score))

    def reason(self, score: float, earlier: Sequence[float]) -> str:
        """Return why a candidate with this score is dropped; empty if it goes on."""
        better, tried = sum(other > score for other in earlier), len(earlier) + 1
        if better < max(ALWAYS_KEPT, ceil(tried / KEPT)):
            return ""
        orders = len(self.trial.shuffles)
        return f"scored {score:.2f} under {orders} branch orders, {better} of {tried - 1} better; not tried under more"

    def twin_reason(self, verdict: CandidateVerdict, earlier: Iterable[CandidateVerdict]) -> str:
        """Return why a candidate that plays like an earlier one is dropped; empty if there is none.

        Their scores are means over many episodes, so they are equal in every trial only if the candidates differ in
        nothing that matters here.
        """
        twin = next((other for other in earlier if other.rungs[: self.number + 1] == verdict.rungs), None)
        if twin is None:
            return ""
        orders = len(self.trial.shuffles)
        return f"scores exactly like {twin.digest[:12]} under {orders} branch orders; not tried under more"


class Check:
    """A trial that may be played a second time: by the kernel and by the controller file."""

    def __init__(self, trial: PendingTrial, by_file: PendingTrial | None = None) -> None:
        self.trial = trial
        self._by_file = by_file

    def disagreement(self) -> str:
        """Return how kernel and file differ; empty if they do not. Raises EngineError."""
        if self._by_file is None:
            return ""
        if failure := describe_failures(self._by_file.scores):
            return self._logged(f"the kernel plays it, and its file fails: {failure}")
        for ours, theirs in zip(self.trial.scores, self._by_file.scores, strict=True):
            differing = (ours.outcomes != theirs.outcomes).any(axis=0)
            if differing.any():
                episodes = f"{int(differing.sum())} of {differing.size} episodes at β = {ours.beta:g}"
                return self._logged(f"the kernel and the controller file disagree in {episodes}")
        return ""

    def _logged(self, text: str) -> str:
        log.error("%s: %s; please report it", self.trial.scores[0].controller, text)
        return text
