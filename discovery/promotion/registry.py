"""The folder of installed controllers, which the proxy reads and the verbs of promotion change.

    registry.json    who is at which stage, and the latest line of the audit: the one file whose renaming is a change
    DIGEST.py        a controller's text, named by its hash
    DIGEST.json      its card: its name, the report it passed by, whether it was forced
    audit.jsonl      a line a change, each with the hash of the line before it

A change is made under a lock. Whatever is cut short leaves the old or the new: files are whole before they are named,
and a line the audit lacks is in registry.json and added by the next change.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

from controllers.errors import BadController
from controllers.loading import Spec, read_source
from controllers.rollout_state import RolloutStage, RolloutState, name_problem
from discovery.data.atomic_files import create_exclusively
from discovery.data.hash_chained_log import ChainFormat, HashChainedLog, hash_line
from discovery.data.safe_json import parse_json
from discovery.errors import DamagedLog, PromotionError

SHORTEST: Final = 4
"""Digits of a digest that may stand for it."""
ORIGIN: Final = "0" * 64
"""The `chain` of the first line of an audit log."""

_UNFINISHED: Final = ".autotts-"

Card = Mapping[str, Any]
"""What is known of an installed controller: its `name` and `digest`, a `headline`, the `report`, whether `forced`."""
Move = Callable[[RolloutState], RolloutState]


@dataclass(frozen=True, slots=True)
class ChangeCause:
    """Who changes what is installed, and why."""

    who: str
    why: str
    when: datetime  # with its time zone
    forced: bool = False  # without a passed gate, or against a quarantine


class FileStamp(NamedTuple):
    """What is different once registry.json has been replaced."""

    changed_ns: int
    inode: int
    size: int


class Registry:
    """The controllers installed in a folder, which need not be there before the first is. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "registry.json"
        self.audit_path = folder / "audit.jsonl"
        self._audit_log = HashChainedLog(self.audit_path, _CHAIN)

    # Reading

    def stamp(self) -> FileStamp | None:
        """Cheaply, whether there is something new to read; None where nothing is installed. Raises PromotionError."""
        try:
            found = self.file.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PromotionError(f"{self.file}: {error.strerror}") from None
        return FileStamp(found.st_mtime_ns, found.st_ino, found.st_size)

    def read(self) -> RolloutState:
        """Who is at which stage now. Raises PromotionError."""
        return self._load()[0]

    def spec(self, digest: str) -> Spec:
        """An installed controller. Raises PromotionError if its file is not what was installed."""
        path = self._source(digest)
        try:
            source = read_source(path)
        except BadController as error:
            raise PromotionError(f"{error}; {_MEND_FILE}") from None
        if sha256(source.encode()).hexdigest() != digest:
            raise PromotionError(f"{path}: its text is not what its name is the hash of; {_MEND_FILE}")
        return Spec(self.card(digest)["name"], source)

    def card(self, digest: str) -> Card:
        """What is known of an installed controller. Raises PromotionError."""
        path = self._card(digest)
        try:
            card = parse_json(path.read_bytes())
        except OSError as error:
            raise PromotionError(f"{path}: {error.strerror}; {_MEND_FILE}") from None
        except ValueError as error:
            raise PromotionError(f"{path}: {error}; {_MEND_FILE}") from None
        if not isinstance(card, dict) or not isinstance(card.get("name"), str) or name_problem(card["name"]):
            raise PromotionError(f"{path}: it names no controller; {_MEND_FILE}")
        return card

    def digests(self) -> list[str]:
        """All that are installed, at a stage or not."""
        return sorted(path.stem for path in self.folder.glob("*.py"))

    def find(self, prefix: str) -> str:
        """The digest of the installed controller whose digest begins so. Raises PromotionError."""
        found = [digest for digest in self.digests() if digest.startswith(prefix)]
        if len(prefix) < SHORTEST or len(found) != 1:
            known = ", ".join(digest[:12] for digest in self.digests()) or "none"
            raise PromotionError(f"{prefix!r} is the beginning of {len(found)} digests in {self.folder}: {known}")
        return found[0]

    def audit(self) -> list[Mapping[str, Any]]:
        """Return every change, the latest last. Raises PromotionError if the audit log is not as it was written."""
        lines, missing = self._audit_lines(self._load()[1])
        try:
            return self._audit_log.verify([*lines, *missing])
        except DamagedLog as error:
            raise PromotionError(f"{error}; {_MEND_AUDIT}") from None

    # Changing

    def install(self, spec: Spec, card: Card, stage: RolloutStage, share: float, by: ChangeCause) -> RolloutState:
        """Put a controller from a file at a stage. Raises PromotionError; nothing has changed then."""
        if spec.source is None or (wrong := name_problem(spec.name)):
            raise PromotionError(wrong if spec.source else f"{spec.name} is built in: it is configured, not promoted")
        told = {**card, "name": spec.name, "digest": spec.digest, "forced": by.forced}
        files = {self._source(spec.digest): spec.source.encode(), self._card(spec.digest): _written(told)}
        return self._change(f"install as {stage}", spec.digest, _promote(spec.digest, stage, share, by), by, files)

    def promote(self, digest: str, stage: RolloutStage, share: float, by: ChangeCause) -> RolloutState:
        """Move an installed controller to a stage. Raises PromotionError."""
        self.spec(digest)
        card = self.card(digest)
        files = {self._card(digest): _written({**card, "forced": True})} if by.forced else {}
        return self._change(f"promote to {stage}", digest, _promote(digest, stage, share, by), by, files)

    def roll_back(self, by: ChangeCause) -> RolloutState:
        """Return to the champion before this one, without a canary. Raises PromotionError."""

        def back(now: RolloutState) -> RolloutState:
            moved = now.roll_back()
            if moved.champion is not None and moved.champion != now.champion:
                self.spec(moved.champion)
            return moved

        return self._change("rollback", None, back, by)

    def drop_canary(self, digest: str, by: ChangeCause) -> RolloutState:
        """No canary any more, if it is this one. Raises PromotionError."""
        return self._change("drop canary", digest, lambda now: now.drop_canary(digest), by)

    def quarantine(self, digest: str, by: ChangeCause) -> RolloutState:
        """A controller that fails is not asked any more. Raises PromotionError."""
        return self._change("quarantine", digest, lambda now: now.quarantine(digest), by)

    def _change(
        self, action: str, digest: str | None, move: Move, by: ChangeCause, files: Mapping[Path, bytes] | None = None
    ) -> RolloutState:
        with self._locked() as folder:
            before, latest = self._load()
            lines = self._mend_audit(latest)
            try:
                after = move(before)
            except ValueError as error:
                raise PromotionError(str(error)) from None
            for path, data in (files or {}).items():
                self._put(path, data)
            os.fsync(folder)
            line = _line(action, digest, before, after, by, hash_line(lines[-1]) if lines else ORIGIN)
            self._put(self.file, _written({**after.as_json(), "audit": line.decode()}))
            with suppress(OSError):  # the change is made, and its line in registry.json: the next change adds it
                self._audit_log.append(line)
            self._keep(folder)
        return after

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The folder's descriptor; nobody else changes anything meanwhile."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                for left in self.folder.glob(f"{_UNFINISHED}*"):  # by one that was killed: whoever lives holds the lock
                    left.unlink()
                yield folder
            finally:
                os.close(folder)
        except OSError as error:
            raise PromotionError(f"{error.filename or self.folder}: {error.strerror}") from None

    def _put(self, path: Path, data: bytes) -> None:
        """A file that is whole on the disk before it has its name."""
        unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
        with create_exclusively(unfinished) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def _keep(self, folder: int) -> None:
        try:
            os.fsync(folder)
        except OSError as error:
            words = "the change is made, but a power cut now may undo it"
            raise PromotionError(f"{self.folder}: {error.strerror}: {words}") from None

    def _mend_audit(self, latest: bytes | None) -> list[bytes]:
        """Complete the audit log after a change that was cut short. Returns its lines."""
        lines, missing = self._audit_lines(latest)
        self._audit_log.remove_torn_line()
        for line in missing:
            self._audit_log.append(line)
        return [*lines, *missing]

    def _audit_lines(self, latest: bytes | None) -> tuple[list[bytes], list[bytes]]:
        """Return the complete lines of the audit log, and the line that only registry.json has, if there is one."""
        try:
            lines = self._audit_log.load().lines
        except DamagedLog as error:
            raise PromotionError(f"{error}; {_MEND_AUDIT}") from None
        if latest is None or latest in lines:
            return lines, []
        if lines and parse_json(latest)["chain"] != hash_line(lines[-1]):
            raise PromotionError(f"{self.audit_path}: registry.json does not follow its last line; {_MEND_AUDIT}")
        return lines, [latest]

    def _load(self) -> tuple[RolloutState, bytes | None]:
        """What registry.json says, and the audit's line it was written with."""
        try:
            data = parse_json(self.file.read_bytes())
            if not isinstance(data, dict) or not isinstance(parse_json(data["audit"])["chain"], str):
                raise ValueError("it is no registry")
            return RolloutState.parse(data), data["audit"].encode()
        except FileNotFoundError:
            return RolloutState(), None
        except OSError as error:
            raise PromotionError(f"{self.file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            words = str(error) if isinstance(error, ValueError) else "it is no registry"
            raise PromotionError(f"{self.file}: {words}; {_MEND_REGISTRY}") from None

    def _source(self, digest: str) -> Path:
        return self.folder / f"{digest}.py"

    def _card(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"


_MEND_FILE: Final = "promote the controller's file again, or `autotts rollback` to the champion before it"
_MEND_AUDIT: Final = "put it back from a copy, or move it away to begin another"
_MEND_REGISTRY: Final = (
    "put it back from a copy, or move it away and promote again: audit.jsonl says what was installed"
)


def _promote(digest: str, stage: RolloutStage, share: float, by: ChangeCause) -> Move:
    return lambda now: now.promote(digest, stage, share, by.forced)


def _line(
    action: str, digest: str | None, before: RolloutState, after: RolloutState, by: ChangeCause, chain: str
) -> bytes:
    """A line of the audit. Of `before` and `after` it has the stages whose holder is another."""
    changed = [stage for stage in RolloutStage if before.stages[stage] != after.stages[stage]]
    record = json.dumps(
        {
            "when": by.when.isoformat(),
            "who": by.who,
            "action": action,
            "why": by.why,
            "digest": digest,
            "before": {stage: before.stages[stage] for stage in changed},
            "after": {stage: after.stages[stage] for stage in changed},
            "share": after.share,
            "forced": by.forced,
            "version": after.version,
            "chain": chain,
        }
    )
    return record.encode()


def _parse_line(line: bytes) -> Mapping[str, Any]:
    try:
        value: Mapping[str, Any] = parse_json(line)
        value["chain"]
    except (KeyError, TypeError):
        raise ValueError("it has no field chain") from None
    return value


_CHAIN: Final[ChainFormat[Mapping[str, Any]]] = ChainFormat(
    ORIGIN, _parse_line, previous_hash=lambda line: line["chain"], starts_at_origin=False
)


def _written(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=2).encode() + b"\n"
