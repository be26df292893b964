"""Commands of `autotts store` on damaged files, and on models and benchmarks that no recording has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxy.cli import app
from tests.discovery.data.test_importers import LINE

PAGE = 4096


def autotts(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Import recordings of two models in a store, and go to its folder."""
    monkeypatch.chdir(tmp_path)
    lines = [LINE | {"model": model, "question": f"q{number}"} for model in ("a", "b") for number in range(200)]
    Path("lines.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert autotts("import", "jsonl", "lines.jsonl", "--store", "s.db")[0] == 0
    return Path("s.db")


def test_a_file_that_sqlite_cannot_read_is_reported_as_damaged_with_the_way_out(store: Path) -> None:
    assert autotts("store", "verify", "--store", "s.db")[0] == 0
    with store.open("r+b") as file:
        file.seek(5 * PAGE)
        file.write(b"\xff" * 20 * PAGE)
    status, output = autotts("store", "verify", "--store", "s.db")
    assert (status, output) == (
        1,
        "s.db: database disk image is malformed; the file is damaged: restore a backup (docs/recording.md#backups)\n",
    )
    assert autotts("store", "export", "out.jsonl", "--store", "s.db") == (2, f"autotts: {output}")
    assert autotts("store", "verify", "--store", "none.db")[0] == 2


def test_a_copy_that_others_can_read_is_warned_of(store: Path) -> None:
    assert "other users" not in autotts("store", "verify", "--store", "s.db")[1]
    store.chmod(0o644)
    status, output = autotts("store", "verify", "--store", "s.db")
    assert status == 0
    assert "s.db: other users can read this file, which holds questions and answers; run `chmod 600`\n" in output


def test_a_model_that_no_recording_has_is_named_with_those_there_are(store: Path) -> None:
    status, output = autotts("store", "prune", "--models", "a,nosuch", "--benchmarks", "none", "--store", str(store))
    assert (status, output) == (
        0,
        "s.db: dropped 0 recordings, 0 branches, 0 questions\n"
        "no recording has the model nosuch; there are: a, b\n"
        f"no recording has the benchmark none; there are: {LINE['benchmark']}\n",
    )
    status, output = autotts("store", "prune", "--models", "a", "--store", str(store))
    assert (status, output.count("\n"), "dropped 200 recordings" in output) == (0, 1, True)
