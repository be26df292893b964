"""Copy a registry or a ledger to another place, from files to PostgreSQL or back, and compare them afterwards.

Both are verified before anything is written, and copied as they are: the same bytes, so that hashes stay valid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from discovery.errors import GateError, PromotionError
from discovery.promotion.ledger import Ledger
from discovery.promotion.registry import Registry, load_state, split_audit
from discovery.promotion.storage.registry_storage import ControllerFiles, RegistryChange
from discovery.store import StorePlace

_CHANGED: Final = "if another process changes one of them, stop it and run the command again"


class RegistryContent(NamedTuple):
    """All that a registry holds."""

    state: bytes | None
    controllers: list[ControllerFiles]
    audit: list[bytes]  # complete, also if a change was cut short


def copy_registry(source: Registry, target: Registry) -> RegistryContent:
    """Copy a registry into an empty one, or go on with a copy that was interrupted.

    Raises PromotionError if the source is empty or was modified, if the target holds another registry, before anything
    is written, or if both differ in the end.
    """
    if _is_same_place(source.place, target.place):
        raise PromotionError(f"{source.place}: a registry cannot be copied into itself; name another place")
    if source.read().version == 0:
        raise PromotionError(f"{source.place}: there is no registry to copy; name a folder or a database with one")
    content = _content(source)
    with target.storage.changing() as storage:
        present = _content(Registry(target.place, storage))
        if present != content and not _is_part(present, content):
            raise PromotionError(
                f"{target.place}: it holds another registry than {source.place}; name a place without one; "
                "nothing was copied"
            )
        if present != content:
            *missing, line = content.audit[len(present.audit) :]
            storage.commit(RegistryChange(content.controllers, content.state or b"", missing, line))
    if not _content(target) == _content(source) == content:
        raise PromotionError(f"{target.place}: it is not as {source.place}; {_CHANGED}")
    return content


def copy_ledger(source: Ledger, target: Ledger) -> int:
    """Copy a ledger into one that is empty or has its first lines, and return the number of judgements.

    Raises GateError if the source is empty or was modified, if the target has other lines, before anything is written,
    or if both differ in the end.
    """
    if _is_same_place(source.place, target.place):
        raise GateError(f"{source.place}: a ledger cannot be copied into itself; name another place")
    lines = source.lines()
    if not source.judgements():
        raise GateError(f"{source.place}: there is no judgement to copy; name a ledger that has some")
    with target.locked():
        present = target.lines()
        if present != lines[: len(present)]:
            raise GateError(
                f"{target.place}: it has other judgements than {source.place}; name an empty ledger; nothing was copied"
            )
        target.extend(lines[len(present) :])
    if not target.lines() == source.lines() == lines:
        raise GateError(f"{target.place}: it is not as {source.place}; {_CHANGED}")
    return len(lines)


def _content(registry: Registry) -> RegistryContent:
    """Return all that a registry holds, verified. Raises PromotionError."""
    controllers = []
    with registry.session() as opened:
        storage = opened.storage
        for digest in opened.digests():
            source = opened.spec(digest).source
            content = None if source is None else source.encode()
            controllers.append(ControllerFiles(digest, storage.card(digest), content))
        opened.audit()
        lines, missing = split_audit(storage, load_state(storage)[1])
        return RegistryContent(storage.state(), controllers, [*lines, *missing])


def _is_part(present: RegistryContent, content: RegistryContent) -> bool:
    """Return whether this is nothing, or a part of a copy that was interrupted before its state was written."""
    return (
        present.state is None
        and set(present.controllers) <= set(content.controllers)
        and len(present.audit) < len(content.audit)
        and present.audit == content.audit[: len(present.audit)]
    )


def _is_same_place(source: StorePlace, target: StorePlace) -> bool:
    if isinstance(source, Path) and isinstance(target, Path):
        return source.exists() and target.exists() and source.samefile(target)
    return source == target
