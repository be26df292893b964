"""Help of the option `--recordings`, in all commands that have it."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command

from proxy.cli import app


@pytest.mark.parametrize("name", ["evaluate", "calibrate", "discover", "gate", "promote", "signals"])
def test_the_help_of_recordings_names_stores_files_and_folders(name: str) -> None:
    group: Any = get_command(app)
    (option,) = (each for each in group.commands[name].params if each.name == "recordings")
    assert option.metavar == "STORE|FILE|FOLDER"
    assert name == "promote" or "file of recordings (.jsonl or .jsonl.xz)" in option.help
