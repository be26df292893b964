"""Rollout state: the controller installed at each stage, as pure data. `discovery/promotion/registry.py` stores it.

a file ──▶ shadow ──▶ canary, for a share of the requests ──▶ champion, for the rest
                         └────────────── rollback ◀──────────────┘
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

from controllers.builtin import ALIASES, BUILT_IN

FORMAT: Final = 1
"""Version of the registry's file format."""
REMEMBERED: Final = 16
"""Former champions that are kept for rollbacks."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RolloutStage(StrEnum):
    """Rollout stages. Each has at most one controller."""

    SHADOW = "shadow"  # decides on the champion's recorded rounds; its answers are never returned
    CANARY = "canary"  # serves a share of the requests that name no controller
    CHAMPION = "champion"  # serves the others


@dataclass(frozen=True, slots=True)
class RolloutState:
    """The controller at each stage, by digest. A move returns a new state, or raises ValueError if it is impossible."""

    version: int = 0  # number of moves so far
    shadow: str | None = None
    canary: str | None = None
    share: float = 0.0  # the canary's share of the requests
    champion: str | None = None  # None: the configured controller
    previous: tuple[str | None, ...] = ()  # earlier champions, the latest last
    quarantined: frozenset[str] = frozenset()

    @property
    def stages(self) -> dict[RolloutStage, str | None]:
        """The digest of the controller at each stage."""
        return {stage: getattr(self, stage) for stage in RolloutStage}

    def stage_of(self, digest: str) -> RolloutStage | None:
        """Return the stage of a controller; None if it is at none."""
        return next((stage for stage, holder in self.stages.items() if holder == digest), None)

    def promote(self, digest: str, stage: RolloutStage, share: float, forced: bool = False) -> RolloutState:
        """Put a controller at `stage`, replacing the present one. Only `forced` lifts a quarantine."""
        if digest == self.champion:
            raise ValueError(f"{digest[:12]} is the champion; run `autotts rollback` first")
        if digest in self.quarantined and not forced:
            raise ValueError(f"{digest[:12]} is quarantined because it failed; --force lifts the quarantine")
        if stage is RolloutStage.CANARY and not 0 <= share <= 1:
            raise ValueError(f"a canary's share is a number from 0 to 1, not {share}")
        left = self.leave(digest)
        moved = replace(left, version=self.version + 1, quarantined=self.quarantined - {digest})
        if stage is RolloutStage.SHADOW:
            return replace(moved, shadow=digest)
        if stage is RolloutStage.CANARY:
            return replace(moved, canary=digest, share=share)
        return replace(moved, champion=digest, previous=(*self.previous, self.champion)[-REMEMBERED:])

    def roll_back(self) -> RolloutState:
        """Return to the previous champion that is not quarantined, and drop the canary."""
        if self.champion is None and self.canary is None:
            raise ValueError("there is neither a canary nor a champion to roll back; the configured controller serves")
        if self.champion is None:
            return replace(self, version=self.version + 1, canary=None, share=0.0)
        left = list(self.previous)
        while left and left[-1] in self.quarantined:
            left.pop()
        champion = left.pop() if left else None
        back = replace(self, version=self.version + 1, canary=None, share=0.0, champion=champion, previous=tuple(left))
        return replace(back, shadow=None) if champion is not None and champion == self.shadow else back

    def drop_canary(self, digest: str) -> RolloutState:
        """Drop the canary, if it is this controller."""
        if self.canary != digest:
            raise ValueError(f"{digest[:12]} is not the canary")
        return replace(self, version=self.version + 1, canary=None, share=0.0)

    def quarantine(self, digest: str) -> RolloutState:
        """Quarantine a failing controller. A champion keeps its stage, and the baseline decides in its place."""
        if digest in self.quarantined:
            raise ValueError(f"{digest[:12]} is quarantined already")
        return replace(self.leave(digest), version=self.version + 1, quarantined=self.quarantined | {digest})

    def leave(self, digest: str) -> RolloutState:
        """Return the state without this controller as canary or shadow."""
        if digest == self.canary:
            return replace(self, canary=None, share=0.0)
        return replace(self, shadow=None) if digest == self.shadow else self

    # JSON

    def as_json(self) -> dict[str, Any]:
        """Return the JSON that `parse` reads."""
        canary = None if self.canary is None else {"digest": self.canary, "share": self.share}
        return {
            "format": FORMAT,
            "version": self.version,
            "shadow": self.shadow,
            "canary": canary,
            "champion": self.champion,
            "previous": list(self.previous),
            "quarantined": sorted(self.quarantined),
        }

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> RolloutState:
        """Read the JSON of `as_json`. Raises ValueError, which names the wrong field."""
        if data.get("format") != FORMAT:
            raise ValueError(f"format is {data.get('format')!r}, not {FORMAT}")
        version, canary = data.get("version"), data.get("canary")
        if type(version) is not int or version < 0:
            raise ValueError(f"version is {version!r}")
        if canary is not None and not isinstance(canary, dict):
            raise ValueError(f"canary is {canary!r}")
        share: object = 0.0 if canary is None else canary.get("share")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"canary: share is {share!r}")
        parsed = cls(
            version=version,
            shadow=_digest("shadow", data.get("shadow")),
            canary=None if canary is None else _digest("canary", canary.get("digest"), needed=True),
            share=float(share),
            champion=_digest("champion", data.get("champion")),
            previous=tuple(_digest("previous", one) for one in _list("previous", data)),
            quarantined=frozenset(str(_digest("quarantined", one, needed=True)) for one in _list("quarantined", data)),
        )
        holders = [holder for holder in parsed.stages.values() if holder is not None]
        if len(set(holders)) != len(holders):
            raise ValueError("one controller is at two stages")
        return parsed


def lot(request_id: str) -> float:
    """Return a number in [0, 1) derived from a request's id. The canary serves numbers below its share."""
    return (int.from_bytes(sha256(request_id.encode()).digest()[:7]) >> 3) / 2**53


def name_problem(name: str) -> str | None:
    """Return the problem with the name of a controller file; None if it is valid. Clients and metrics show the name."""
    if not _NAME.fullmatch(name):
        return f"{name!r}: name the file with letters, digits, - and _, at most 64 characters"
    if name in BUILT_IN or name in ALIASES:
        return f"there is a built-in controller {name}; give the file another name"
    return None


def _digest(field: str, value: object, needed: bool = False) -> str | None:
    if value is None and not needed:
        return None
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{field}: {value!r} is not a digest")
    return value


def _list(field: str, data: Mapping[str, Any]) -> list[Any]:
    value = data.get(field)
    if not isinstance(value, list):
        raise ValueError(f"{field} is {value!r}")
    return value
