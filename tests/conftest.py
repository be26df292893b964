"""Fixtures every folder may use."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see the settings they give, whatever AUTOTTS_* the machine has."""
    import os

    for name in [name for name in os.environ if name.startswith("AUTOTTS_")]:
        monkeypatch.delenv(name)
