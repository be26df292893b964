"""Controllers at each rollout stage, read from the registry. They serve requests that name no controller."""

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
    """The controller at each stage."""

    champion: Spec
    canary: Spec | None = None
    share: float = 0.0
    shadow: Spec | None = None
    quarantined: frozenset[str] = frozenset()  # digests
    version: int = 0  # of the registry

    def choose(self, request_id: str) -> ChosenController:
        """Return the controller of a request. The same id gets the same controller in every process."""
        if self.canary is not None and lot(request_id) < self.share:
            return ChosenController(self.canary, RolloutStage.CANARY)
        return ChosenController(self.champion, RolloutStage.CHAMPION)

    def at(self, stage: RolloutStage) -> Spec | None:
        """Return the controller at a stage, or None."""
        return {
            RolloutStage.SHADOW: self.shadow,
            RolloutStage.CANARY: self.canary,
            RolloutStage.CHAMPION: self.champion,
        }[stage]

    def without(self, digest: str) -> StageAssignment:
        """Return the assignment without this controller as canary or shadow."""
        if self.canary is not None and self.canary.digest == digest:
            return replace(self, canary=None, share=0.0)
        return replace(self, shadow=None) if self.shadow is not None and self.shadow.digest == digest else self

    def quarantine(self, digest: str) -> StageAssignment:
        """Return the assignment with this controller quarantined."""
        return replace(self.without(digest), quarantined=self.quarantined | {digest})

    def __str__(self) -> str:
        text = f"champion {_named(self.champion)}"
        if self.canary is not None:
            text += f", canary {_named(self.canary)} for {self.share:.0%}"
        return text if self.shadow is None else f"{text}, shadow {_named(self.shadow)}"


class RolloutStages:
    """The current assignment, read from a registry. Without a registry the configured controller is the champion."""

    def __init__(self, registry: Registry | None, default: Spec, poll_s: float) -> None:
        self.registry = registry
        self.current = StageAssignment(default)  # as read, with later changes of this process
        self._default = default
        self._poll_s = poll_s
        self._polled_at = float("-inf")  # by the monotonic clock
        self._stamp: FileStamp | None = None
        self._reading = False
        self._logged_problem = ""

    async def refresh(self) -> bool:
        """Read the registry if it has changed, and return whether it has.

        If it cannot be read, the problem is logged once and the assignment stays.
        """
        now = time.monotonic()
        if self.registry is None or self._reading or now - self._polled_at < self._poll_s:
            return False
        self._polled_at, self._reading = now, True
        try:
            stamp = self.registry.stamp()
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            self.current = await asyncio.to_thread(self._read, self.registry)
        except PromotionError as error:
            self._log_once(f"{error}; keeping {self.current}")
            return False
        finally:
            self._reading = False
        self._logged_problem = ""
        logger.info("registry version %d: %s", self.current.version, self.current)
        return True

    async def change(self, change: Callable[[Registry], RolloutState]) -> None:
        """Apply a change to the registry. If that fails, `current` stays until the registry file changes again."""
        if self.registry is None:
            return
        try:
            await asyncio.to_thread(change, self.registry)
        except PromotionError as error:
            logger.error(
                "cannot write the registry; the change holds only in this process, until the registry changes: %s",
                error,
            )
        self._polled_at = float("-inf")

    def _read(self, registry: Registry) -> StageAssignment:
        installed = registry.read()
        specs = {stage: None if holder is None else registry.spec(holder) for stage, holder in installed.stages.items()}
        return StageAssignment(
            champion=specs[RolloutStage.CHAMPION] or self._default,
            canary=specs[RolloutStage.CANARY],
            share=installed.share,
            shadow=specs[RolloutStage.SHADOW],
            quarantined=installed.quarantined,
            version=installed.version,
        )

    def _log_once(self, problem: str) -> None:
        if problem != self._logged_problem:
            self._logged_problem = problem
            logger.error("%s", problem)


def _named(spec: Spec) -> str:
    return f"{spec.name} ({spec.digest[:12]})" if spec.is_foreign else spec.name
