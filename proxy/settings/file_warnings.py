"""Warnings about files that settings name: those that others can read, and folders that cannot be written to."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from discovery.data.atomic_files import readable_warning
from proxy.settings.model import Settings, StoreText, is_secret
from proxy.settings.sources import Configured


def secret_warnings(configured: Configured, file: Path | None) -> Iterator[str]:
    """Yield a warning for each file of this user that holds keys or secrets and that others can read.

    Files of other users, such as those that a container gets, are left out: this user cannot change their mode.
    """
    keys = configured.settings.keys
    holds_secrets = any(is_secret(name) and source == f"file {file}" for name, source in configured.sources.items())
    for path, content in ((keys, "keys"), (file if holds_secrets else None, "secrets")):
        if path is not None and _is_own(path) and (warning := readable_warning(path, content)):
            yield warning


def store_warnings(settings: Settings) -> Iterator[str]:
    """Yield a warning if others can read the store, or if it cannot be made in its folder."""
    store = settings.store
    if not isinstance(store, Path):
        return
    if settings.store_text is not StoreText.NONE and (warning := readable_warning(store, "request texts")):
        yield warning
    place = store if store.exists() else store.resolve().parent
    if place.exists() and not os.access(place, os.W_OK):
        yield f"store: {place} cannot be written to; records would wait in the spill file, if that can be written to"


def _is_own(path: Path) -> bool:
    """Return whether this user owns the file at `path`."""
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return False


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect the messages that are logged meanwhile as warnings, instead of logging them."""
    collector = _WarningCollector()
    root = logging.getLogger()
    root.addHandler(collector)
    try:
        yield collector.messages
    finally:
        root.removeHandler(collector)


class _WarningCollector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
