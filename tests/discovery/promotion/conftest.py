"""Fixtures of the contracts of registries and ledgers: the same tests in files and in PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from discovery.promotion.registry import Registry
from discovery.store import StorePlace
from tests.discovery.promotion.outside import PLACES, new_place


@pytest.fixture(params=PLACES)
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """Return a registry in which nothing is installed."""
    return Registry(new_place(request, request.param, tmp_path / "installed"))


@pytest.fixture(params=PLACES)
def ledger_place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    """Return the place of a ledger that has no lines."""
    return new_place(request, request.param, tmp_path / "ledger")
