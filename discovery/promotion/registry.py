"""Registry: the installed controllers, which the proxy reads and the promotion commands change.

It has the rollout state, a source and a card for each controller, and an audit log of one line per change, in a hash
chain. A card holds a controller's name, its gate report, and whether it was forced. A built-in controller has a card
only. Its digest is the hash of its name, so that its card cannot be changed either.

The rules are here. `discovery/promotion/storage/` keeps it in a folder or in a PostgreSQL database.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage, RolloutState, StageHolders, name_problem
from discovery.data.hash_chained_log import ChainFormat, hash_line
from discovery.data.recordings import Split
from discovery.data.safe_json import parse_json
from discovery.errors import DamagedLog, PromotionError, RegistryAway
from discovery.promotion.storage.cards import (
    BUILT_IN_MARK,
    MEND_FILE,
    Card,
    InstalledCards,
    built_in_problem,
    read_card,
    read_cards,
)
from discovery.promotion.storage.registry_database import RegistryDatabase
from discovery.promotion.storage.registry_folder import RegistryFolder
from discovery.promotion.storage.registry_storage import ControllerFiles, RegistryChange, RegistryStorage
from discovery.store import StorePlace

SHORTEST: Final = 4
"""Minimum digits of a digest prefix."""
ORIGIN: Final = "0" * 64
"""The `chain` of the first line of an audit log."""

Move = Callable[[RolloutState], RolloutState]
MakeFiles = Callable[[RegistryStorage], ControllerFiles]
"""Returns what is kept of a controller, given the registry while nobody else changes it."""


@dataclass(frozen=True, slots=True)
class ChangeCause:
    """Who made a change to the registry, why and when."""

    who: str
    why: str
    when: datetime  # with time zone
    forced: bool = False  # without a passed gate, or despite a quarantine
    version: int | None = None  # that the registry must have; None: any


class Registry:
    """The controllers installed in a folder or a database. Threads may share it."""

    def __init__(self, place: StorePlace, storage: RegistryStorage | None = None) -> None:
        self.place = place
        self.storage = storage or (RegistryFolder(place) if isinstance(place, Path) else RegistryDatabase(place))

    # Reading

    @contextmanager
    def session(self) -> Iterator[Registry]:
        """Yield the registry over one connection, for several reads. Raises PromotionError."""
        with self.storage.session() as storage:
            yield Registry(self.place, storage)

    def stamp(self) -> Hashable | None:
        """Return a value that changes with the registry; None if nothing is installed. Raises PromotionError."""
        return self.storage.stamp()

    def read(self) -> RolloutState:
        """Return the controllers by stage. Raises PromotionError."""
        return load_state(self.storage)[0]

    def spec(self, digest: str) -> Spec:
        """Load an installed controller. Raises PromotionError if it is missing or was changed."""
        return _spec(self.storage, digest)

    def card(self, digest: str) -> Card:
        """Return the card of an installed controller. Raises PromotionError."""
        return read_card(self.storage, digest)

    def cards(self, digests: Iterable[str] | None = None) -> InstalledCards:
        """Return the cards of these controllers, or of all installed ones. Raises PromotionError, but not for a card
        that is missing or damaged.
        """
        with self.storage.session() as storage:
            return read_cards(storage, storage.digests() if digests is None else digests)

    def digests(self) -> list[str]:
        """Return the digests of all installed controllers, at a stage or not. Raises PromotionError."""
        return self.storage.digests()

    def find(self, prefix: str) -> str:
        """Return the full digest of the installed controller with this prefix. Raises PromotionError."""
        digests = self.digests()
        matching = [digest for digest in digests if digest.startswith(prefix)]
        if len(prefix) < SHORTEST or len(matching) != 1:
            known = ", ".join(digest[:12] for digest in digests) or "none"
            raise PromotionError(
                f"{prefix!r} is no built-in controller, and matches {len(matching)} digests in {self.place}; name a "
                f"built-in one, a FILE.py, or at least {SHORTEST} digits of one of {known}"
            )
        return matching[0]

    def audit(self) -> list[Mapping[str, Any]]:
        """Return every change, the latest last. Raises PromotionError if the audit log was modified."""
        with self.storage.session() as storage:
            lines, missing = split_audit(storage, load_state(storage)[1])
        try:
            return _CHAIN.verify([*lines, *missing], self.storage.audit_name)
        except DamagedLog as error:
            raise PromotionError(f"{error}; {self.storage.mend_audit}") from None

    # Changing

    def install(
        self, spec: Spec, card: Card, stage: RolloutStage, share: float, by: ChangeCause, model: str | None = None
    ) -> RolloutState:
        """Install a controller at a stage of a model; None: of the default. Raises PromotionError; nothing has changed
        then. The `models` of its card are added to those of the card that it has already.
        """
        if wrong := name_problem(spec.name) if spec.is_foreign else built_in_problem(spec.name):
            raise PromotionError(wrong)

        def files(storage: RegistryStorage) -> ControllerFiles:
            known = _known_card(storage, spec.digest)
            made = {**_with_known_models(card, known), "name": spec.name, "digest": spec.digest, "forced": by.forced}
            if spec.source is None:
                made[BUILT_IN_MARK] = True
            return ControllerFiles(spec.digest, _as_bytes(made), None if spec.source is None else spec.source.encode())

        move = _promote(spec.digest, stage, share, by, model)
        return self._change(f"install as {stage}", spec.digest, move, by, model, files)

    def promote(
        self, digest: str, stage: RolloutStage, share: float, by: ChangeCause, model: str | None = None
    ) -> RolloutState:
        """Move an installed controller to a stage of a model; None: of the default. Raises PromotionError."""
        self.spec(digest)

        def marked(storage: RegistryStorage) -> ControllerFiles:
            source = _spec(storage, digest).source
            card = {**read_card(storage, digest), "forced": True}
            return ControllerFiles(digest, _as_bytes(card), None if source is None else source.encode())

        move = _promote(digest, stage, share, by, model)
        return self._change(f"promote to {stage}", digest, move, by, model, marked if by.forced else None)

    def roll_back(self, by: ChangeCause, model: str | None = None) -> RolloutState:
        """Restore the previous champion of a model and drop its canary; None: of the default. Raises PromotionError."""

        def back(now: RolloutState) -> RolloutState:
            moved = now.roll_back(model)
            champion = moved.own(model).champion
            if champion is not None and champion != now.own(model).champion:
                self.spec(champion)
            return moved

        return self._change("rollback", None, back, by, model)

    def drop_canary(self, digest: str, by: ChangeCause, model: str | None = None) -> RolloutState:
        """Drop the canary of a model, if it is this controller; None: of the default. Raises PromotionError."""
        return self._change("drop canary", digest, lambda now: now.drop_canary(digest, model), by, model)

    def drop_shadow(self, digest: str, by: ChangeCause, model: str | None = None) -> RolloutState:
        """Drop the shadow of a model, if it is this controller; None: of the default. Raises PromotionError."""
        return self._change("drop shadow", digest, lambda now: now.drop_shadow(digest, model), by, model)

    def quarantine(self, digest: str, by: ChangeCause) -> RolloutState:
        """Quarantine a failing controller, so that it decides for no model. Raises PromotionError."""

        def quarantined(now: RolloutState) -> RolloutState:
            return now if digest in now.quarantined else now.quarantine(digest)  # by several proxies at once

        return self._change("quarantine", digest, quarantined, by)

    def _change(
        self,
        action: str,
        digest: str | None,
        move: Move,
        by: ChangeCause,
        model: str | None = None,
        make_files: MakeFiles | None = None,
    ) -> RolloutState:
        """Make a change, unless everything is already as it would be afterwards. Returns the state."""
        with self.storage.changing() as storage:
            before, latest = load_state(storage)
            if by.version not in (None, before.version):
                raise PromotionError(
                    f"{self.place}: changed meanwhile, to version {before.version}; look at it again, then repeat this"
                )
            lines, missing = split_audit(storage, latest)
            try:
                after = move(before)
            except ValueError as error:
                raise PromotionError(str(error)) from None
            controllers = [] if make_files is None else [make_files(storage)]
            controllers = [files for files in controllers if not _is_kept(storage, files)]
            if not controllers and replace(after, version=before.version) == before:
                return before  # somebody has made this change already
            latest_line = [*lines, *missing][-1:]
            chain = hash_line(latest_line[0]) if latest_line else ORIGIN
            line = _line(action, digest, before, after, by, chain, model)
            state = _as_bytes({**after.as_json(), "audit": line.decode()})
            storage.commit(RegistryChange(controllers, state, missing, line))
        return after


def load_state(storage: RegistryStorage) -> tuple[RolloutState, bytes | None]:
    """Return the state of a registry, and the audit line it was written with. Raises PromotionError."""
    content = storage.state()
    if content is None:
        return RolloutState(), None
    try:
        data = parse_json(content)
        if not isinstance(data, dict) or not isinstance(parse_json(data["audit"])["chain"], str):
            raise ValueError("not a registry")
        return RolloutState.parse(data), data["audit"].encode()
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "not a registry"
        raise PromotionError(f"{storage.state_name}: {reason}; {storage.mend_state}") from None


def split_audit(storage: RegistryStorage, latest: bytes | None) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of the audit log, and the line that only the state has, if there is one."""
    lines = storage.audit_lines()
    if latest is None or latest in lines:
        return lines, []
    if lines and parse_json(latest)["chain"] != hash_line(lines[-1]):
        raise PromotionError(f"{storage.audit_name}: the registry does not follow its last line; {storage.mend_audit}")
    return lines, [latest]


def _spec(storage: RegistryStorage, digest: str) -> Spec:
    card = read_card(storage, digest)
    if card.get(BUILT_IN_MARK):
        return Spec(card["name"])
    try:
        source = storage.source(digest)
    except RegistryAway:
        raise
    except PromotionError as error:
        raise PromotionError(f"{error}; {MEND_FILE}") from None
    if sha256(source.encode()).hexdigest() != digest:
        raise PromotionError(
            f"{storage.source_name(digest)}: the content does not match the hash in its name; {MEND_FILE}"
        )
    return Spec(card["name"], source)


def _known_card(storage: RegistryStorage, digest: str) -> Card | None:
    """Return the card of a controller; None if it has none, or one that cannot be used and is replaced."""
    try:
        return read_card(storage, digest) if digest in storage.digests() else None
    except RegistryAway:
        raise
    except PromotionError:
        return None


def _with_known_models(card: Card, known: Card | None) -> Card:
    """Return a card that lists the models of the card before as well; without `models` if either is about all.

    A card that was forced does not count: its report need not have passed. Nor does one on questions that searches see.
    """
    if not card.get("models") or known is None or known.get("report") is None or known.get("forced"):
        return card
    if judged_splits(known["report"]) != [Split.HELD_OUT]:
        return card
    if known.get("models"):
        return {**card, "models": sorted({*card["models"], *known["models"]})}
    return {name: value for name, value in card.items() if name != "models"}


def judged_splits(report: Any) -> list[str]:
    """Return the splits of a report's questions; earlier gates passed others than held-out ones, too."""
    cells = report.get("cells") if isinstance(report, Mapping) else None
    return sorted({str(cell.get("split") or "unknown") for cell in cells or [{}]})


def _is_kept(storage: RegistryStorage, files: ControllerFiles) -> bool:
    """Return whether the registry has exactly these contents."""
    try:
        if files.digest not in storage.digests() or storage.card(files.digest) != files.card:
            return False
        return files.source is None or storage.source(files.digest).encode() == files.source
    except RegistryAway:
        raise
    except PromotionError:
        return False


def _promote(digest: str, stage: RolloutStage, share: float, by: ChangeCause, model: str | None) -> Move:
    return lambda now: now.promote(digest, stage, share, by.forced, model)


def _line(
    action: str,
    digest: str | None,
    before: RolloutState,
    after: RolloutState,
    by: ChangeCause,
    chain: str,
    model: str | None,
) -> bytes:
    """Return a line of the audit log. `before` and `after` list only the stages whose controller changed.

    They are those of `model`; None: of the default. `models` has the changes of other models, if there are any.
    """
    others = sorted({*before.models, *after.models} - {model})
    changes = {name: changed for name in others if (changed := _changed(before.own(name), after.own(name)))["before"]}
    record = json.dumps(
        {
            "when": by.when.isoformat(),
            "who": by.who,
            "action": action,
            "why": by.why,
            "digest": digest,
            **({} if model is None else {"model": model}),
            **_changed(before.own(model), after.own(model)),
            "share": after.own(model).share,
            **({"models": changes} if changes else {}),
            "forced": by.forced,
            "version": after.version,
            "chain": chain,
        }
    )
    return record.encode()


def _changed(before: StageHolders, after: StageHolders) -> dict[str, dict[str, str | None]]:
    changed = [stage for stage in RolloutStage if before.stages[stage] != after.stages[stage]]
    return {
        "before": {stage: before.stages[stage] for stage in changed},
        "after": {stage: after.stages[stage] for stage in changed},
    }


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
