"""Interface of the places of a registry. The rules of its changes are in `discovery/promotion/registry.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, NamedTuple


class ControllerFiles(NamedTuple):
    """Contents of an installed controller."""

    digest: str
    card: bytes  # JSON
    source: bytes | None  # None for a built-in controller


class RegistryChange(NamedTuple):
    """All that one change writes."""

    controllers: Sequence[ControllerFiles]  # new ones and those whose card has changed
    state: bytes  # JSON: the rollout state, and the last of the lines
    missing: Sequence[bytes]  # lines of the audit log that were committed before and are not in it yet
    line: bytes  # of the audit log


class RegistryStorage(ABC):
    """The place of a registry. Its methods raise PromotionError, whose message names what cannot be read or written."""

    mend_state: ClassVar[str]
    """Way out if the state cannot be read."""
    mend_audit: ClassVar[str]
    """Way out if the audit log was changed."""

    # Names of the parts in messages

    @property
    @abstractmethod
    def state_name(self) -> str:
        """Where the state is."""

    @property
    @abstractmethod
    def audit_name(self) -> str:
        """Where the audit log is."""

    @abstractmethod
    def card_name(self, digest: str) -> str:
        """Return where the card of a controller is."""

    @abstractmethod
    def source_name(self, digest: str) -> str:
        """Return where the source of a controller is."""

    # Reading

    @abstractmethod
    def stamp(self) -> Hashable | None:
        """Return a value that differs after every change; None if nothing is installed."""

    @abstractmethod
    def state(self) -> bytes | None:
        """Return the state; None if nothing is installed."""

    @abstractmethod
    def digests(self) -> list[str]:
        """Return the digests of all controllers, sorted."""

    @abstractmethod
    def card(self, digest: str) -> bytes:
        """Return the card of a controller."""

    @abstractmethod
    def source(self, digest: str) -> str:
        """Return the source of a controller."""

    @abstractmethod
    def audit_lines(self) -> list[bytes]:
        """Return the complete lines of the audit log, not verified."""

    @abstractmethod
    def session(self) -> AbstractContextManager[RegistryStorage]:
        """Yield this storage over one connection, for several reads."""

    # Changing

    @abstractmethod
    def changing(self) -> AbstractContextManager[RegistryStorage]:
        """Wait until nobody else changes the registry, and yield this storage, which may then commit one change."""

    @abstractmethod
    def commit(self, change: RegistryChange) -> None:
        """Make a change, all of it or nothing. It is on disk when the context of `changing` has ended."""
