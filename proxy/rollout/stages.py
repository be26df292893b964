"""Who decides for requests that name no controller, as the registry has it now: a running proxy follows its changes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage, RolloutState, lot
from discovery.errors import PromotionError
from discovery.promotion.registry import FileStamp, Registry
from proxy.types import ChosenController

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageAssignment:
    """Who is at which stage."""

    champion: Spec
    canary: Spec | None = None
    share: float = 0.0
    shadow: Spec | None = None
    quarantined: frozenset[str] = frozenset()  # digests
    version: int = 0  # of the registry

    def choose(self, request_id: str) -> ChosenController:
        """Who decides for a request: the same for the same id, wherever it is asked."""
        if self.canary is not None and lot(request_id) < self.share:
            return ChosenController(self.canary, RolloutStage.CANARY)
        return ChosenController(self.champion, RolloutStage.CHAMPION)

    def at(self, stage: RolloutStage) -> Spec | None:
        """Who is at a stage."""
        return {
            RolloutStage.SHADOW: self.shadow,
            RolloutStage.CANARY: self.canary,
            RolloutStage.CHAMPION: self.champion,
        }[stage]

    def without(self, digest: str) -> StageAssignment:
        """The same without this one as canary or shadow."""
        if self.canary is not None and self.canary.digest == digest:
            return replace(self, canary=None, share=0.0)
        return replace(self, shadow=None) if self.shadow is not None and self.shadow.digest == digest else self

    def quarantine(self, digest: str) -> StageAssignment:
        """The same with this one quarantined."""
        return replace(self.without(digest), quarantined=self.quarantined | {digest})

    def __str__(self) -> str:
        words = f"champion {_named(self.champion)}"
        if self.canary is not None:
            words += f", canary {_named(self.canary)} for {self.share:.0%}"
        return words if self.shadow is None else f"{words}, shadow {_named(self.shadow)}"


class RolloutStages:
    """A line-up that follows a registry; without one it is the configured controller's alone."""

    def __init__(self, registry: Registry | None, default: Spec, poll_s: float) -> None:
        self.registry = registry
        self.current = StageAssignment(default)  # or what has been decided here since it was read
        self._default = default
        self._poll_s = poll_s
        self._looked = float("-inf")  # when last, by the monotonic clock
        self._stamp: FileStamp | None = None
        self._reading = False
        self._complaint = ""

    async def refresh(self) -> bool:
        """Take over what the registry says if it says something new; whether it did.

        One that cannot be read is complained of, once, and what was installed goes on.
        """
        now = time.monotonic()
        if self.registry is None or self._reading or now - self._looked < self._poll_s:
            return False
        self._looked, self._reading = now, True
        try:
            stamp = self.registry.stamp()
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            self.current = await asyncio.to_thread(self._read, self.registry)
        except PromotionError as error:
            self._complain(f"{error}; meanwhile as before: {self.current}")
            return False
        finally:
            self._reading = False
        self._complaint = ""
        logger.info("registry version %d: %s", self.current.version, self.current)
        return True

    async def change(self, move: Callable[[Registry], RolloutState]) -> None:
        """Have the registry say what `now` does. If it cannot be, that holds until it is next changed."""
        if self.registry is None:
            return
        try:
            await asyncio.to_thread(move, self.registry)
        except PromotionError as error:
            logger.error("the registry does not know, until it is next changed this process does: %s", error)
        self._looked = float("-inf")

    def _read(self, registry: Registry) -> StageAssignment:
        installed = registry.read()
        found = {stage: None if holder is None else registry.spec(holder) for stage, holder in installed.stages.items()}
        return StageAssignment(
            champion=found[RolloutStage.CHAMPION] or self._default,
            canary=found[RolloutStage.CANARY],
            share=installed.share,
            shadow=found[RolloutStage.SHADOW],
            quarantined=installed.quarantined,
            version=installed.version,
        )

    def _complain(self, words: str) -> None:
        if words != self._complaint:
            self._complaint = words
            logger.error(words)


def _named(spec: Spec) -> str:
    return f"{spec.name} ({spec.digest[:12]})" if spec.is_foreign else spec.name
