"""Places of registries and ledgers, and changes of them without their rules, as by an editor or by SQL."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from discovery.promotion.registry import Registry
from discovery.promotion.storage.registry_folder import RegistryFolder
from discovery.promotion.storage.tables import AUDIT, CONTROLLERS, LEDGER, STATE
from discovery.store import StorePlace
from tests.discovery.store.outside import run_sql

PLACES: Final = ("files", pytest.param("postgres", marks=pytest.mark.process))
"""Parameters of a fixture that runs tests in both kinds of places."""


def new_place(request: pytest.FixtureRequest, kind: str, path: Path) -> StorePlace:
    """Return an empty place of a kind in `PLACES`: this path, or a schema of a database."""
    if kind == "files":
        return path
    made: StorePlace = request.getfixturevalue("postgres").create_schema()
    return made


def folder_of(registry: Registry) -> RegistryFolder:
    """Return the folder of a registry that is in one."""
    assert isinstance(registry.storage, RegistryFolder)
    return registry.storage


def write_state(registry: Registry, content: bytes | None) -> None:
    """Replace the state; None removes it."""
    if isinstance(registry.place, Path):
        return _write(folder_of(registry).file, content)
    if content is None:
        run_sql(registry.place, f"DELETE FROM {STATE}")
    else:
        run_sql(registry.place, f"UPDATE {STATE} SET content = {_bytea(content)}, chain = 'changed'")
    return None


def write_source(registry: Registry, digest: str, content: bytes | None) -> None:
    """Replace the source of a controller; None removes it."""
    if isinstance(registry.place, Path):
        return _write(registry.place / f"{digest}.py", content)
    run_sql(registry.place, f"UPDATE {CONTROLLERS} SET source = {_bytea(content)} WHERE digest = '{digest}'")
    return None


def write_card(registry: Registry, digest: str, content: bytes) -> None:
    """Replace the card of a controller."""
    if isinstance(registry.place, Path):
        return _write(registry.place / f"{digest}.json", content)
    run_sql(registry.place, f"UPDATE {CONTROLLERS} SET card = {_bytea(content)} WHERE digest = '{digest}'")
    return None


def write_audit(registry: Registry, lines: list[bytes]) -> None:
    """Replace the audit log."""
    _write_lines(registry.place, Path("audit.jsonl"), AUDIT, lines)


def ledger_lines(place: StorePlace) -> list[bytes]:
    """Return the lines of a ledger."""
    if isinstance(place, Path):
        return place.read_bytes().splitlines()
    return [bytes(line) for (line,) in run_sql(place, f"SELECT line FROM {LEDGER} ORDER BY number")]


def write_ledger(place: StorePlace, lines: list[bytes]) -> None:
    """Replace the lines of a ledger."""
    _write_lines(place, None, LEDGER, lines)


def _write_lines(place: StorePlace, name: Path | None, table: str, lines: list[bytes]) -> None:
    if isinstance(place, Path):
        path = place if name is None else place / name
        return _write(path, b"".join(line + b"\n" for line in lines) if lines else None)
    run_sql(place, f"DELETE FROM {table}")
    for number, line in enumerate(lines, 1):
        run_sql(place, f"INSERT INTO {table} (number, line) VALUES ({number}, {_bytea(line)})")
    return None


def _write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def _bytea(content: bytes | None) -> str:
    return "NULL" if content is None else f"decode('{content.hex()}', 'hex')"
