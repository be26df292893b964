"""Limits of an episode, which controllers see in `State.limits`, and reservations under its token cap.

Branches that do not pause are reserved: once open, each may cost its whole limit, whatever the controller does. The
state and the environment compute the same limits from the same facts, so that no action needs to carry one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Protocol

from controllers.actions import BRANCH, Action

GROWTH: Final = 2
"""Factor by which a branch may be longer than the longest one that has voted."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an episode. Token limits are worst cases that the state reserves; None means no limit."""

    interval: int  # tokens of one interval, Δ
    max_branches: int = 64  # branches that may ever be opened
    branch_tokens: int | None = None  # most tokens of a branch
    probe_tokens: int = 0  # most tokens of a probe
    max_tokens: int | None = None  # most tokens of the episode; a hard cap
    has_probes: bool = True  # whether branches can be probed; otherwise PROBE is illegal
    has_pauses: bool = True  # whether branches wait between intervals; otherwise each costs its tokens once it is open

    def __post_init__(self) -> None:
        # The compiled core refuses 0 and 1 as flags, which stored episodes may have that went through the spill file.
        for name in ("has_probes", "has_pauses"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        for name in ("interval", "max_branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"Limits.{name} must be at least 1, not {getattr(self, name)}")
        if self.max_tokens is not None and self.branch_tokens is None:
            raise ValueError("Limits.max_tokens needs branch_tokens: without it the worst case of TO_END is unknown")


class KnownBranch(Protocol):
    """The facts of a branch that reservations depend on."""

    tokens: int
    finished: bool
    label: int | None


def free_tokens(cap: int, branches: Iterable[tuple[int, int, bool]]) -> int:
    """Return the tokens of the cap that are not spent or reserved.

    `branches` are triples of a branch's limit, its tokens, and whether it has finished. Only a finished branch, pruned
    or not, costs no more than its tokens.
    """
    return cap - sum(tokens if finished else limit for limit, tokens, finished in branches)


def branch_limit(branch_tokens: int, free: int, opened: int) -> int:
    """Return the most tokens of each of `opened` branches of a round, before which `free` tokens are free."""
    return min(branch_tokens, free // opened)


class Reservations:
    """Limits of the branches of one episode under a token cap."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._cap, self._branch_tokens = limits.max_tokens or 0, limits.branch_tokens or 0
        self._reserved: list[int] = []  # by branch

    def affordable(self, actions: Sequence[Action], branches: Sequence[KnownBranch]) -> Sequence[Action]:
        """Return the longest prefix of `actions` whose new branches fit under the cap.

        Until a branch has voted, each new one must fit whole, because shorter ones might all be cut before their
        answer. After that it must fit with `GROWTH` times the tokens of the longest voter, and an interval.
        """
        longest = max((branch.tokens for branch in branches if branch.finished and branch.label is not None), default=0)
        least = self._branch_tokens
        if longest:
            least = min(least, GROWTH * longest + self._limits.interval)
        most = max(0, self._free(branches)) // max(1, least)
        openings = accumulate(action.verb is BRANCH for action in actions)
        return [action for action, opened in zip(actions, openings, strict=True) if opened <= most]

    def limit(self, actions: Sequence[Action], branches: Sequence[KnownBranch]) -> int:
        """Return the limit of each branch that a round opens after `branches`; 0 if it opens none."""
        opened = sum(action.verb is BRANCH for action in actions)
        return branch_limit(self._branch_tokens, self._free(branches), opened) if opened else 0

    def add(self, limit: int, opened: int) -> None:
        """Reserve `limit` tokens for each of `opened` new branches."""
        self._reserved += [limit] * opened

    def _free(self, branches: Sequence[KnownBranch]) -> int:
        known = zip(self._reserved, branches, strict=True)
        return free_tokens(self._cap, ((limit, branch.tokens, branch.finished) for limit, branch in known))
