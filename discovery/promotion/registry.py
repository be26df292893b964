"""Registry: the folder of installed controllers, which the proxy reads and the promotion commands change.

    registry.json    the controller at each stage, and the latest line of the audit log
    DIGEST.py        a controller's source, named by its hash
    DIGEST.json      its card: its name, its gate report, whether it was forced
    audit.jsonl      one line per change, in a hash chain

Changes are made under a lock, and renaming registry.json commits them. A change that is cut short leaves the old or
the new state: files are complete before they get their names, and an audit line that is missing from audit.jsonl is in
registry.json, from which the next change adds it.
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
"""Minimum digits of a digest prefix."""
ORIGIN: Final = "0" * 64
"""The `chain` of the first line of an audit log."""

_UNFINISHED: Final = ".autotts-"

Card = Mapping[str, Any]
"""Facts about an installed controller: `name`, `digest`, `headline`, `report`, and whether it was `forced`."""
Move = Callable[[RolloutState], RolloutState]


@dataclass(frozen=True, slots=True)
class ChangeCause:
    """Who made a change to the registry, why and when."""

    who: str
    why: str
    when: datetime  # with time zone
    forced: bool = False  # without a passed gate, or despite a quarantine


class FileStamp(NamedTuple):
    """Identity of one version of registry.json; it differs after every replacement."""

    changed_ns: int
    inode: int
    size: int


class Registry:
    """The controllers installed in a folder, which is created by the first change. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "registry.json"
        self.audit_path = folder / "audit.jsonl"
        self._audit_log = HashChainedLog(self.audit_path, _CHAIN)

    # Reading

    def stamp(self) -> FileStamp | None:
        """Return a value that changes with registry.json; None if nothing is installed. Raises PromotionError."""
        try:
            status = self.file.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PromotionError(f"{self.file}: {error.strerror}") from None
        return FileStamp(status.st_mtime_ns, status.st_ino, status.st_size)

    def read(self) -> RolloutState:
        """Return the controllers by stage. Raises PromotionError."""
        return self._load()[0]

    def spec(self, digest: str) -> Spec:
        """Load an installed controller. Raises PromotionError if its file is missing or was changed."""
        path = self._source(digest)
        try:
            source = read_source(path)
        except BadController as error:
            raise PromotionError(f"{error}; {_MEND_FILE}") from None
        if sha256(source.encode()).hexdigest() != digest:
            raise PromotionError(f"{path}: the content does not match the hash in its name; {_MEND_FILE}")
        return Spec(self.card(digest)["name"], source)

    def card(self, digest: str) -> Card:
        """Return the card of an installed controller. Raises PromotionError."""
        path = self._card(digest)
        try:
            card = parse_json(path.read_bytes())
        except OSError as error:
            raise PromotionError(f"{path}: {error.strerror}; {_MEND_FILE}") from None
        except ValueError as error:
            raise PromotionError(f"{path}: {error}; {_MEND_FILE}") from None
        if not isinstance(card, dict) or not isinstance(card.get("name"), str) or name_problem(card["name"]):
            raise PromotionError(f"{path}: not the card of a controller; {_MEND_FILE}")
        return card

    def digests(self) -> list[str]:
        """Return the digests of all installed controllers, at a stage or not."""
        return sorted(path.stem for path in self.folder.glob("*.py"))

    def find(self, prefix: str) -> str:
        """Return the full digest of the installed controller with this prefix. Raises PromotionError."""
        matching = [digest for digest in self.digests() if digest.startswith(prefix)]
        if len(prefix) < SHORTEST or len(matching) != 1:
            known = ", ".join(digest[:12] for digest in self.digests()) or "none"
            raise PromotionError(
                f"{prefix!r} matches {len(matching)} digests in {self.folder}; "
                f"give at least {SHORTEST} digits of one of {known}"
            )
        return matching[0]

    def audit(self) -> list[Mapping[str, Any]]:
        """Return every change, the latest last. Raises PromotionError if the audit log was modified."""
        lines, missing = self._audit_lines(self._load()[1])
        try:
            return self._audit_log.verify([*lines, *missing])
        except DamagedLog as error:
            raise PromotionError(f"{error}; {_MEND_AUDIT}") from None

    # Changing

    def install(self, spec: Spec, card: Card, stage: RolloutStage, share: float, by: ChangeCause) -> RolloutState:
        """Install a controller from a file at a stage. Raises PromotionError; nothing has changed then."""
        if spec.source is None or (wrong := name_problem(spec.name)):
            raise PromotionError(
                wrong
                if spec.source
                else f"{spec.name} is built in; select it in the configuration instead of promoting it"
            )
        complete_card = {**card, "name": spec.name, "digest": spec.digest, "forced": by.forced}
        files = {self._source(spec.digest): spec.source.encode(), self._card(spec.digest): _as_bytes(complete_card)}
        return self._change(f"install as {stage}", spec.digest, _promote(spec.digest, stage, share, by), by, files)

    def promote(self, digest: str, stage: RolloutStage, share: float, by: ChangeCause) -> RolloutState:
        """Move an installed controller to a stage. Raises PromotionError."""
        self.spec(digest)
        card = self.card(digest)
        files = {self._card(digest): _as_bytes({**card, "forced": True})} if by.forced else {}
        return self._change(f"promote to {stage}", digest, _promote(digest, stage, share, by), by, files)

    def roll_back(self, by: ChangeCause) -> RolloutState:
        """Restore the previous champion and drop the canary. Raises PromotionError."""

        def back(now: RolloutState) -> RolloutState:
            moved = now.roll_back()
            if moved.champion is not None and moved.champion != now.champion:
                self.spec(moved.champion)
            return moved

        return self._change("rollback", None, back, by)

    def drop_canary(self, digest: str, by: ChangeCause) -> RolloutState:
        """Drop the canary if it is this controller. Raises PromotionError."""
        return self._change("drop canary", digest, lambda now: now.drop_canary(digest), by)

    def quarantine(self, digest: str, by: ChangeCause) -> RolloutState:
        """Quarantine a failing controller, so that it no longer decides. Raises PromotionError."""
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
                self._write(path, data)
            os.fsync(folder)
            line = _line(action, digest, before, after, by, hash_line(lines[-1]) if lines else ORIGIN)
            self._write(self.file, _as_bytes({**after.as_json(), "audit": line.decode()}))
            with suppress(OSError):  # the change is committed; the next change adds the line from registry.json
                self._audit_log.append(line)
            self._sync(folder)
        return after

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Lock the folder against other writers and yield its descriptor. Raises PromotionError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                for left in self.folder.glob(f"{_UNFINISHED}*"):  # left by a killed process, since the lock is ours
                    left.unlink()
                yield folder
            finally:
                os.close(folder)
        except OSError as error:
            raise PromotionError(f"{error.filename or self.folder}: {error.strerror}") from None

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file completely to the disk before it gets its name."""
        unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
        with create_exclusively(unfinished) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def _sync(self, folder: int) -> None:
        try:
            os.fsync(folder)
        except OSError as error:
            warning = "the change is made, but a power failure now may undo it"
            raise PromotionError(f"{self.folder}: {error.strerror}: {warning}") from None

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
        """Return the content of registry.json, and the audit line it was written with."""
        try:
            data = parse_json(self.file.read_bytes())
            if not isinstance(data, dict) or not isinstance(parse_json(data["audit"])["chain"], str):
                raise ValueError("not a registry")
            return RolloutState.parse(data), data["audit"].encode()
        except FileNotFoundError:
            return RolloutState(), None
        except OSError as error:
            raise PromotionError(f"{self.file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, ValueError) else "not a registry"
            raise PromotionError(f"{self.file}: {reason}; {_MEND_REGISTRY}") from None

    def _source(self, digest: str) -> Path:
        return self.folder / f"{digest}.py"

    def _card(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"


_MEND_FILE: Final = "promote the controller's file again, or return to the previous champion with `autotts rollback`"
_MEND_AUDIT: Final = "restore it from a copy, or move it away to begin a new one"
_MEND_REGISTRY: Final = (
    "restore it from a copy, or move it away and promote again; audit.jsonl lists what was installed"
)


def _promote(digest: str, stage: RolloutStage, share: float, by: ChangeCause) -> Move:
    return lambda now: now.promote(digest, stage, share, by.forced)


def _line(
    action: str, digest: str | None, before: RolloutState, after: RolloutState, by: ChangeCause, chain: str
) -> bytes:
    """Return a line of the audit log. `before` and `after` list only the stages whose controller changed."""
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


def _as_bytes(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=2).encode() + b"\n"
