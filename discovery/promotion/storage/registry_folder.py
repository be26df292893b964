"""Registry in a folder.

    registry.json    the controllers at each stage of each model, and the latest line of the audit log
    DIGEST.py        a controller's source, named by its hash
    DIGEST.json      its card: its name, its gate report, whether it was forced
    audit.jsonl      one line per change, in a hash chain

Changes are made under a lock, and renaming registry.json commits them. A change that is cut short leaves the old or
the new state: files are complete before they get their names, and an audit line that is missing from audit.jsonl is in
registry.json, from which the next change adds it.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

from controllers.errors import BadController
from controllers.loading import read_source
from discovery.data.atomic_files import create_exclusively
from discovery.data.hash_chained_log import LogFile
from discovery.errors import DamagedLog, PromotionError
from discovery.promotion.storage.registry_storage import RegistryChange, RegistryStorage

_UNFINISHED: Final = ".autotts-"
_CARD: Final = re.compile(r"[0-9a-f]{64}\.json")


class FileStamp(NamedTuple):
    """Identity of one version of registry.json; it differs after every replacement."""

    changed_ns: int
    inode: int
    size: int


class RegistryFolder(RegistryStorage):
    """A registry in a folder, which is created by the first change. Threads may share it."""

    mend_state: ClassVar[str] = (
        "restore it from a copy, or move it away and promote again; audit.jsonl lists what was installed"
    )
    mend_audit: ClassVar[str] = "restore it from a copy, or move it away to begin a new one"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "registry.json"
        self.audit_log = LogFile(folder / "audit.jsonl")

    @property
    def state_name(self) -> str:
        return str(self.file)

    @property
    def audit_name(self) -> str:
        return str(self.audit_log.path)

    def card_name(self, digest: str) -> str:
        return str(self._card_path(digest))

    def source_name(self, digest: str) -> str:
        return str(self._source_path(digest))

    def stamp(self) -> FileStamp | None:
        try:
            status = self.file.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refusal(self.file, error) from None
        return FileStamp(status.st_mtime_ns, status.st_ino, status.st_size)

    def state(self) -> bytes | None:
        try:
            return self.file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refusal(self.file, error) from None

    def digests(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json") if _CARD.fullmatch(path.name))

    def card(self, digest: str) -> bytes:
        path = self._card_path(digest)
        try:
            return path.read_bytes()
        except OSError as error:
            raise _refusal(path, error) from None

    def source(self, digest: str) -> str:
        try:
            return read_source(self._source_path(digest))
        except BadController as error:
            raise PromotionError(str(error)) from None

    def audit_lines(self) -> list[bytes]:
        try:
            return self.audit_log.load().lines
        except DamagedLog as error:
            raise PromotionError(f"{error}; {self.mend_audit}") from None

    @contextmanager
    def session(self) -> Iterator[RegistryFolder]:
        yield self

    @contextmanager
    def changing(self) -> Iterator[RegistryFolder]:
        """Lock the folder against other writers."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                for left in self.folder.glob(f"{_UNFINISHED}*"):  # left by a killed process, since the lock is ours
                    left.unlink()
                yield self
            finally:
                os.close(folder)
        except OSError as error:
            raise _refusal(error.filename or self.folder, error) from None

    def commit(self, change: RegistryChange) -> None:
        self._complete_audit(change)
        for controller in change.controllers:
            if controller.source is not None:
                self._write(self._source_path(controller.digest), controller.source)
            self._write(self._card_path(controller.digest), controller.card)
        self._sync()
        self._write(self.file, change.state)
        with suppress(OSError):  # the change is committed; the next change adds the line from registry.json
            self.audit_log.append(change.line)
        try:
            self._sync()
        except OSError as error:
            warning = "the change is made, but a power failure now may undo it"
            raise PromotionError(f"{self.folder}: {error.strerror}: {warning}") from None

    def _complete_audit(self, change: RegistryChange) -> None:
        """Complete the audit log after a change that was cut short, before its line in registry.json is replaced."""
        try:
            self.audit_log.remove_torn_line()
        except DamagedLog as error:
            raise PromotionError(f"{error}; {self.mend_audit}") from None
        for line in change.missing:
            self.audit_log.append(line)

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file completely to the disk before it gets its name."""
        unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
        with create_exclusively(unfinished) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def _sync(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _source_path(self, digest: str) -> Path:
        return self.folder / f"{digest}.py"

    def _card_path(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"


def _refusal(path: str | Path, error: OSError) -> PromotionError:
    """Return the error about a file that cannot be read or written, with the way out if that is not permitted."""
    advice = "; let this user read and write the registry, or name another (AUTOTTS_REGISTRY)"
    return PromotionError(f"{path}: {error.strerror}{advice if isinstance(error, PermissionError) else ''}")
