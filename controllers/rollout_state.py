"""Rollout state: the controllers at each stage of each model, as pure data.

`discovery/promotion/registry.py` stores it.

a file or a built-in ──▶ shadow ──▶ canary, for a share of the requests ──▶ champion, for the rest
                                       └────────────── rollback ◀──────────────┘

The default's stages serve every model that has no champion of its own. A model's own stages come first: see `of_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from controllers.builtin import ALIASES, BUILT_IN

FORMAT: Final = 2
"""Version of the registry's file format. While no model has stages of its own, a file is written in format 1."""
REMEMBERED: Final = 16
"""Former champions that are kept for rollbacks."""
LONGEST_MODEL: Final = 512
"""Maximum characters of a model's name."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RolloutStage(StrEnum):
    """Rollout stages. Each has at most one controller per model."""

    SHADOW = "shadow"  # decides on the champion's recorded rounds; its answers are never returned
    CANARY = "canary"  # serves a share of the requests that name no controller
    CHAMPION = "champion"  # serves the others


@dataclass(frozen=True, slots=True)
class StageHolders:
    """The controller at each stage of one model, or of the default, by digest."""

    shadow: str | None = None
    canary: str | None = None
    share: float = 0.0  # the canary's share of the requests
    champion: str | None = None  # None: the default's; of the default itself, the configured controller
    previous: tuple[str | None, ...] = ()  # earlier champions, the latest last

    @property
    def stages(self) -> dict[RolloutStage, str | None]:
        """The digest of the controller at each stage."""
        return {stage: getattr(self, stage) for stage in RolloutStage}

    def stage_of(self, digest: str) -> RolloutStage | None:
        """Return the stage of a controller; None if it is at none."""
        return next((stage for stage, holder in self.stages.items() if holder == digest), None)

    def put(self, digest: str, stage: RolloutStage, share: float) -> StageHolders:
        """Return the holders with a controller at `stage`, and at no other."""
        left = self.without(digest)
        if stage is RolloutStage.SHADOW:
            return replace(left, shadow=digest)
        if stage is RolloutStage.CANARY:
            return replace(left, canary=digest, share=share)
        return replace(left, champion=digest, previous=(*left.previous, left.champion)[-REMEMBERED:])

    def without(self, digest: str) -> StageHolders:
        """Return the holders without this controller as canary or shadow."""
        if digest == self.canary:
            return self.without_canary()
        return replace(self, shadow=None) if digest == self.shadow else self

    def without_canary(self) -> StageHolders:
        """Return the holders without a canary."""
        return replace(self, canary=None, share=0.0)

    def roll_back(self, quarantined: frozenset[str]) -> StageHolders:
        """Return the holders with the previous champion that is not quarantined, and without the canary."""
        if self.champion is None:
            return self.without_canary()
        left = list(self.previous)
        while left and left[-1] in quarantined:
            left.pop()
        champion = left.pop() if left else None
        back = replace(self.without_canary(), champion=champion, previous=tuple(left))
        return replace(back, shadow=None) if champion is not None and champion == self.shadow else back

    def as_json(self) -> dict[str, Any]:
        """Return the JSON that `parse` reads."""
        return {
            "shadow": self.shadow,
            "canary": None if self.canary is None else {"digest": self.canary, "share": self.share},
            "champion": self.champion,
            "previous": list(self.previous),
        }

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> StageHolders:
        """Read the JSON of `as_json`. Raises ValueError, which names the wrong field."""
        canary = data.get("canary")
        if canary is not None and not isinstance(canary, dict):
            raise ValueError(f"canary is {canary!r}")
        share: object = 0.0 if canary is None else canary.get("share")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"canary: share is {share!r}")
        parsed = cls(
            shadow=_digest("shadow", data.get("shadow")),
            canary=None if canary is None else _digest("canary", canary.get("digest"), needed=True),
            share=float(share),
            champion=_digest("champion", data.get("champion")),
            previous=tuple(_digest("previous", holder) for holder in _list("previous", data)),
        )
        holders = [holder for holder in parsed.stages.values() if holder is not None]
        if len(set(holders)) != len(holders):
            raise ValueError("one controller is at two stages")
        return parsed


NOBODY: Final = StageHolders()
"""The stages of a model that has none of its own."""


class ModelStages(NamedTuple):
    """The controllers that serve one model, and for each stage the model that it is set for; None: the default."""

    holders: StageHolders
    owners: Mapping[RolloutStage, str | None]

    def as_json(self) -> dict[str, Any]:
        """Return the digest at each stage and the model it is set for, as JSON."""
        stages = {stage: holder for stage, holder in self.holders.stages.items() if holder is not None}
        return {
            str(stage): {"digest": digest, "set_for": self.owners[stage] or "default"}
            for stage, digest in stages.items()
        }


@dataclass(frozen=True, slots=True)
class RolloutState:
    """The controllers at each stage of each model. A move returns a new state, or raises ValueError if impossible."""

    version: int = 0  # number of moves so far
    default: StageHolders = NOBODY
    models: Mapping[str, StageHolders] = field(default_factory=lambda: MappingProxyType({}))
    """Models with stages of their own."""
    quarantined: frozenset[str] = frozenset()

    def own(self, model: str | None) -> StageHolders:
        """Return the stages of a model itself, or of the default if `model` is None."""
        return self.default if model is None else self.models.get(model, NOBODY)

    def of_model(self, model: str) -> ModelStages:
        """Return the controllers that serve a model.

        The default's canary and shadow are tried on the default's champion. So they do not serve a model that has a
        champion, or a canary or shadow respectively, of its own.
        """
        own, default = self.own(model), self.default
        champion = own.champion or default.champion
        canary, share, shadow = own.canary, own.share, own.shadow
        owners: dict[RolloutStage, str | None] = {
            stage: model if holder is not None else None for stage, holder in own.stages.items()
        }
        if own.champion is None:
            shadow = own.shadow or default.shadow
            canary, share = (own.canary, own.share) if own.canary else (default.canary, default.share)
        if canary == champion:  # the default's champion was the model's canary
            canary, share = None, 0.0
        shadow = None if shadow in (champion, canary) else shadow
        return ModelStages(StageHolders(shadow, canary, share, champion), owners)

    @property
    def staged(self) -> frozenset[str]:
        """The digests of the controllers at any stage of any model."""
        every = (self.default, *self.models.values())
        return frozenset(digest for holders in every for digest in holders.stages.values() if digest is not None)

    def stages_of(self, digest: str) -> Iterator[tuple[str | None, RolloutStage]]:
        """Yield the stages of a controller, each with its model; None: the default."""
        for model, holders in ((None, self.default), *self.models.items()):
            if (stage := holders.stage_of(digest)) is not None:
                yield model, stage

    # Moves

    def promote(
        self, digest: str, stage: RolloutStage, share: float, forced: bool = False, model: str | None = None
    ) -> RolloutState:
        """Put a controller at `stage` of a model, replacing the present one. Only `forced` lifts a quarantine."""
        own = self.own(model)
        if digest == own.champion and stage is not RolloutStage.CHAMPION:
            scope = "" if model is None else f" of model {model}"
            raise ValueError(f"{digest[:12]} is the champion{scope}; run `autotts rollback` first")
        if stage is not RolloutStage.CHAMPION and own.champion is None and digest == self.default.champion:
            raise ValueError(f"{digest[:12]} already serves model {model} as the default's champion")
        if digest in self.quarantined and not forced:
            raise ValueError(f"{digest[:12]} is quarantined because it failed; --force lifts the quarantine")
        if stage is RolloutStage.CANARY and not 0 <= share <= 1:
            raise ValueError(f"a canary's share is a number from 0 to 1, not {share}")
        if model is not None and (wrong := model_problem(model)):
            raise ValueError(wrong)
        moved = replace(self, quarantined=self.quarantined - {digest})
        return moved._with(model, own if digest == own.champion else own.put(digest, stage, share))

    def roll_back(self, model: str | None = None) -> RolloutState:
        """Return to a model's previous champion that is not quarantined, finally the default's, and drop its canary."""
        own = self.own(model)
        if own.champion is None and own.canary is None:
            if own.shadow is not None:
                scope, option = ("", "") if model is None else (f"model {model} has ", f" --model {model}")
                raise ValueError(
                    f"{scope or 'there is '}neither a canary nor a champion to roll back, only a shadow; "
                    f"`autotts rollback --shadow{option}` takes it away"
                )
            if model is None:
                raise ValueError(
                    "there is neither a canary nor a champion to roll back; the configured controller serves"
                )
            known = ", ".join(sorted(self.models)) or "none"
            raise ValueError(
                f"model {model} has neither a canary nor a champion to roll back; the default serves it "
                f"(models with their own: {known})"
            )
        return self._with(model, own.roll_back(self.quarantined))

    def drop_canary(self, digest: str, model: str | None = None) -> RolloutState:
        """Drop a model's canary, if it is this controller."""
        own = self.own(model)
        if own.canary != digest:
            raise ValueError(f"{digest[:12]} is not the canary{'' if model is None else f' of model {model}'}")
        return self._with(model, own.without_canary())

    def drop_shadow(self, digest: str, model: str | None = None) -> RolloutState:
        """Drop a model's shadow, if it is this controller."""
        own = self.own(model)
        if own.shadow != digest:
            raise ValueError(f"{digest[:12]} is not the shadow{'' if model is None else f' of model {model}'}")
        return self._with(model, own.without(digest))

    def quarantine(self, digest: str) -> RolloutState:
        """Quarantine a failing controller: it leaves every stage of every model, and the default serves these models.

        Only the default's champion keeps its stage; the baseline decides in its place.
        """
        if digest in self.quarantined:
            raise ValueError(f"{digest[:12]} is quarantined already")
        state = replace(self, quarantined=self.quarantined | {digest})
        for model in self.models:
            left = self.models[model].without(digest)
            state = state._put(model, replace(left, champion=None) if left.champion == digest else left)
        return state._with(None, state.default.without(digest))

    def _with(self, model: str | None, holders: StageHolders) -> RolloutState:
        """Return the next version, with these stages of a model."""
        return replace(self._put(model, holders), version=self.version + 1)

    def _put(self, model: str | None, holders: StageHolders) -> RolloutState:
        """Return the state with these stages of a model. A model without any stage and history is dropped."""
        if model is None:
            return replace(self, default=holders)
        models = {**self.models, model: holders}
        if not any(holders.stages.values()) and not any(holders.previous):
            del models[model]
        return replace(self, models=MappingProxyType(models))

    # JSON

    def as_json(self) -> dict[str, Any]:
        """Return the JSON that `parse` reads. Without stages of models it is of format 1, which has none."""
        models = {model: self.models[model].as_json() for model in sorted(self.models)}
        return {
            "format": FORMAT if models else 1,
            "version": self.version,
            **self.default.as_json(),
            "quarantined": sorted(self.quarantined),
            **({"models": models} if models else {}),
        }

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> RolloutState:
        """Read the JSON of `as_json`, also of format 1. Raises ValueError, which names the wrong field."""
        if data.get("format") not in (1, FORMAT):
            raise ValueError(f"format is {data.get('format')!r}, not 1 or {FORMAT}")
        version = data.get("version")
        if type(version) is not int or version < 0:
            raise ValueError(f"version is {version!r}")
        quarantined = _list("quarantined", data)
        return cls(
            version=version,
            default=StageHolders.parse(data),
            models=MappingProxyType(_models(data.get("models")) if data["format"] == FORMAT else {}),
            quarantined=frozenset(str(_digest("quarantined", digest, needed=True)) for digest in quarantined),
        )


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


def model_problem(model: str) -> str | None:
    """Return the problem with a model's name; None if it is valid."""
    if not model or len(model) > LONGEST_MODEL or not model.isprintable() or model != model.strip():
        return f"{model!r} is not the name of a model; give it as `GET /v1/models` lists it"
    return None


def _models(data: object) -> dict[str, StageHolders]:
    if not isinstance(data, dict):
        raise ValueError(f"models is {data!r}")
    parsed = {}
    for model, stages in data.items():
        if wrong := model_problem(model):
            raise ValueError(f"models: {wrong}")
        if not isinstance(stages, dict):
            raise ValueError(f"models: {model} is {stages!r}")
        try:
            parsed[model] = StageHolders.parse(stages)
        except ValueError as error:
            raise ValueError(f"models: {model}: {error}") from None
    return parsed


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
