"""Interface of the environment of one episode, as far as bills, metrics and records use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from controllers import Environment
from proxy.environment.token_meter import TokenMeter
from proxy.telemetry.chain_lengths import EpisodeBranch


class AnswerTexts(Protocol):
    """The answers behind labels."""

    def __len__(self) -> int: ...

    def written(self, label: int) -> str:
        """Return the text of the first answer with this label."""
        ...

    def recorded(self, label: int) -> str:
        """Return what a recording holds of this label."""
        ...


class EpisodeEnvironment(Environment, Protocol):
    """An environment of one request on the upstream."""

    cutoff: str | None  # why the proxy, not the controller, ended the episode; recorded as `refused`

    @property
    def branches(self) -> Sequence[EpisodeBranch]:
        """All branches, in the order in which they were opened."""

    @property
    def meter(self) -> TokenMeter:
        """Tokens and requests that the upstream has spent on this request."""

    @property
    def labels(self) -> AnswerTexts:
        """The answers behind the labels."""

    @property
    def votable(self) -> bool:
        """Whether the task can be voted on, according to what is known so far."""

    @property
    def own_probe_tokens(self) -> int:
        """Tokens of probes that no controller asked for."""

    def record_cutoff(self, reason: str) -> None:
        """Record why the proxy, not the controller, ended the episode."""

    def salvage(self) -> None:
        """Keep what had been generated when the episode was interrupted."""
