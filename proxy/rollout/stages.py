"""Controllers at each rollout stage of each model, read from the registry.

They serve requests that name no controller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Final

from controllers.loading import Spec
from controllers.rollout_state import ModelStages, RolloutStage, RolloutState, lot
from discovery.errors import PromotionError, RegistryAway
from discovery.promotion.registry import Registry
from proxy.types import ChosenController

logger = logging.getLogger(__name__)

RETRY_S: Final = 1.0
"""Most seconds between attempts to reach a registry whose database is away."""


@dataclass(frozen=True, slots=True)
class StageAssignment:
    """The controller at each stage that serves one model."""

    champion: Spec
    canary: Spec | None = None
    share: float = 0.0
    shadow: Spec | None = None
    owners: Mapping[RolloutStage, str | None] = field(default_factory=lambda: MappingProxyType({}))
    """The model that a stage is set for, or None: the default."""

    def choose(self, request_id: str) -> ChosenController:
        """Return the controller of a request. The same id gets the same controller in every process."""
        is_canary = self.canary is not None and lot(request_id) < self.share
        stage = RolloutStage.CANARY if is_canary else RolloutStage.CHAMPION
        return ChosenController(self.at(stage) or self.champion, stage, self.owner(stage))

    def owner(self, stage: RolloutStage) -> str | None:
        """Return the model that a stage is set for; None: the default."""
        return self.owners.get(stage)

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

    def as_json(self) -> dict[str, object]:
        """Return the controllers and the models their stages are set for, as `/ready` reports them."""
        stages = {stage: spec for stage in reversed(RolloutStage) if (spec := self.at(stage)) is not None}
        return {
            str(stage): {
                "controller": spec.name,
                "digest": spec.digest[:12],
                "set_for": self.owner(stage) or "default",
                **({"share": self.share} if stage is RolloutStage.CANARY else {}),
            }
            for stage, spec in stages.items()
        }

    def __str__(self) -> str:
        text = f"champion {_named(self.champion)}"
        if self.canary is not None:
            text += f", canary {_named(self.canary)} for {self.share:.0%}"
        return text if self.shadow is None else f"{text}, shadow {_named(self.shadow)}"


@dataclass(frozen=True, slots=True)
class ModelAssignments:
    """The controllers that serve each model."""

    default: StageAssignment  # of the models that are not named in `models`
    models: Mapping[str, StageAssignment] = field(default_factory=lambda: MappingProxyType({}))
    quarantined: frozenset[str] = frozenset()  # digests
    installed: frozenset[str] = frozenset()  # digests that the registry has at a stage
    version: int = 0  # of the registry

    def of(self, model: str) -> StageAssignment:
        """Return the controllers that serve a model."""
        return self.models.get(model, self.default)

    @property
    def canaries(self) -> dict[str | None, tuple[Spec, Spec]]:
        """The canary and the champion it is compared with, by the model that the canary is set for."""
        return {
            each.owner(RolloutStage.CANARY): (each.canary, each.champion)
            for each in reversed(list(self))
            if each.canary is not None
        }

    def __iter__(self) -> Iterator[StageAssignment]:
        """Yield each assignment, the default's first."""
        return iter((self.default, *self.models.values()))

    def without_canary(self, owner: str | None) -> ModelAssignments:
        """Return the assignments without the canary that is set for a model; None: for the default."""

        def changed(each: StageAssignment) -> StageAssignment:
            is_dropped = each.canary is not None and each.owner(RolloutStage.CANARY) == owner
            return replace(each, canary=None, share=0.0) if is_dropped else each

        return self._map(changed)

    def quarantine(self, digest: str) -> ModelAssignments:
        """Return the assignments with this controller quarantined, as `RolloutState.quarantine` does."""

        def changed(each: StageAssignment) -> StageAssignment:
            if each.champion.digest == digest and each.owner(RolloutStage.CHAMPION) is not None:
                owners = MappingProxyType({**each.owners, RolloutStage.CHAMPION: None})
                each = replace(each, champion=self.default.champion, owners=owners)
            return each.without(digest)

        return replace(self._map(changed), quarantined=self.quarantined | {digest})

    def _map(self, change: Callable[[StageAssignment], StageAssignment]) -> ModelAssignments:
        models = {model: change(each) for model, each in self.models.items()}
        return replace(self, default=change(self.default), models=MappingProxyType(models))

    def __str__(self) -> str:
        own = (f"model {model}: {each}" for model, each in self.models.items())
        return "; ".join([str(self.default), *own])


class RolloutStages:
    """The current assignments, read from a registry. Without a registry the configured controller is the champion."""

    def __init__(self, registry: Registry | None, default: Spec, poll_s: float) -> None:
        self.registry = registry
        self.current = ModelAssignments(StageAssignment(default))  # as read, with later changes of this process
        self._default = default
        self._poll_s = poll_s
        self._polled_at = float("-inf")  # by the monotonic clock
        self._stamp: Hashable | None = None
        self._reading: asyncio.Task[None] | None = None
        self.problem = ""  # why the registry cannot be read now
        self._problem_of_stamp = ""  # why the version with this stamp cannot be read
        self._closing = asyncio.Event()

    async def refresh(self) -> None:
        """Read a registry in a folder if it has changed. `RegistryWatch` reads others.

        Requests that arrive while it is read wait for the same read, which goes on if one of them is cancelled. If it
        cannot be read, the problem is logged once and the assignments stay.
        """
        now, registry = time.monotonic(), self.registry
        if registry is None or not isinstance(registry.place, Path):
            return
        if self._reading is None:
            if now - self._polled_at < self._poll_s:
                return
            self._polled_at = now
            self._reading = asyncio.create_task(self._poll(registry))
        await asyncio.shield(self._reading)

    async def _poll(self, registry: Registry) -> None:
        try:
            await self.follow(registry.stamp())
        except PromotionError as error:
            self.log_problem(error)
        finally:
            self._reading = None

    async def follow(self, stamp: Hashable | None) -> bool:
        """Read the registry if this is not the stamp that it had, and return whether it was. Raises PromotionError."""
        if self.registry is None:
            return False
        if stamp == self._stamp:
            self.problem = self._problem_of_stamp
            return False
        before, self._stamp = self._stamp, stamp
        try:
            self.current, problem = await asyncio.to_thread(self._read, self.registry)
        except PromotionError as error:
            if isinstance(self.registry.place, Path):
                self._problem_of_stamp = str(error)
            else:
                self._stamp = before  # a database may have gone away; a file stays as it is until it is replaced
            raise
        if problem and problem != self.problem:
            logger.error("%s; until the registry changes, proxies go on without it", problem)
        self.problem = self._problem_of_stamp = problem
        logger.info("registry version %d: %s", self.current.version, self.current)
        return True

    def log_problem(self, error: PromotionError) -> None:
        """Log once that the registry cannot be read."""
        if str(error) != self.problem:
            self.problem = str(error)
            logger.error("%s; keeping %s", error, self.current)

    async def change(self, change: Callable[[Registry], RolloutState]) -> None:
        """Apply a change to the registry, as soon as its database can be reached.

        If that fails, `current` stays until the registry changes again.
        """
        if self.registry is None:
            return
        for attempt in count():
            try:
                await asyncio.to_thread(change, self.registry)
                break
            except RegistryAway as error:
                if not attempt:
                    logger.error("cannot write the registry yet; the change holds only in this process: %s", error)
                if await self._is_closing(RETRY_S):
                    break
            except PromotionError as error:
                logger.error(
                    "cannot write the registry; the change holds only in this process, until the registry changes: %s",
                    error,
                )
                break
        self._polled_at = float("-inf")

    def close(self) -> None:
        """Give up changes of a registry whose database is away."""
        self._closing.set()

    async def _is_closing(self, most_s: float) -> bool:
        """Wait for `close`, and return whether it was called within so many seconds."""
        try:
            async with asyncio.timeout(most_s):
                return await self._closing.wait()
        except TimeoutError:
            return False

    def _read(self, registry: Registry) -> tuple[ModelAssignments, str]:
        """Return the assignments, and why canaries and shadows are left out. Raises PromotionError for a champion."""
        with registry.session() as opened:
            installed = opened.read()
            champions = {holders.champion for holders in (installed.default, *installed.models.values())}
            specs: dict[str | None, Spec] = {}
            problems = []
            for digest in sorted(installed.staged):
                try:
                    specs[digest] = opened.spec(digest)
                except RegistryAway:
                    raise
                except PromotionError as error:
                    if digest in champions:
                        raise
                    problems.append(f"canary or shadow {digest[:12]} cannot be loaded: {error}")

        def assigned(stages: ModelStages) -> StageAssignment:
            holders = stages.holders
            shadow, canary, champion = map(specs.get, holders.stages.values())
            share = 0.0 if canary is None else holders.share
            assignment = StageAssignment(champion or self._default, canary, share, shadow, stages.owners)
            return assignment.without(assignment.champion.digest)  # the configured controller may be canary, too

        assignments = ModelAssignments(
            default=assigned(ModelStages(installed.default, {})),
            models=MappingProxyType({model: assigned(installed.of_model(model)) for model in installed.models}),
            quarantined=installed.quarantined,
            installed=installed.staged,
            version=installed.version,
        )
        return assignments, "; ".join(problems)


def _named(spec: Spec) -> str:
    return f"{spec.name} ({spec.digest[:12]})" if spec.is_foreign else spec.name
