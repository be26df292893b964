"""Fixture of the contract of stores: the same tests over every database."""

from __future__ import annotations

from pathlib import Path

import pytest

from discovery.store import StorePlace


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.process)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    """Return the place of a store that does not exist yet."""
    if request.param == "sqlite":
        return tmp_path / "s.db"
    made: StorePlace = request.getfixturevalue("postgres").create_database()
    return made
