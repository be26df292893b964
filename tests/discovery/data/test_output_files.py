"""Files named as output: one that exists is replaced only by output of its own kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from discovery.data.atomic_files import OutputKind, check_output, json_list, json_mapping, json_object
from discovery.data.importers import format_recording_line
from discovery.data.recordings import RecordedBranch, RecordedQuestion, Split, question_id
from discovery.errors import FileWriteError
from proxy.cli import app

CARD = '{"name": "mine", "digest": "d", "settings": {}}'
ADVICE = "would be lost; name another file, or move it away"


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        (json_object("k", "a", "b"), ['{"a": 1, "b": 2, "c": 3}'], ['{"a": 1}', "[]", '[{"a": 1, "b": 2}]']),
        (json_list("k", "a"), ['[{"a": 1}]', "[]"], ['{"a": 1}', '[{"a": 1}, {"b": 1}]', '["a"]']),
        (json_mapping("k", "a"), ['{"m": {"a": 1}}'], ['{"a": 1}', "{}", '[{"a": 1}]', '{"m": {"a": 1}, "n": {}}']),
    ],
)
def test_a_file_of_json_is_recognised_by_its_keys(
    tmp_path: Path, kind: OutputKind, own: list[str], others: list[str]
) -> None:
    path = tmp_path / "f.json"
    check_output(path, "--json", kind)
    for content in ("", *own):
        path.write_text(content)
        check_output(path, "--json", kind)
    for content in (*others, "beta = 0.5", "class Mine:", "{", "\x00"):
        path.write_text(content)
        with pytest.raises(FileWriteError, match=f"^--json {path}: the file is not k and {ADVICE}"):
            check_output(path, "--json", kind)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    chains = [RecordedBranch(["7"], 150, final) for final in ("7", "7", "8", "9")]
    questions = [
        RecordedQuestion(question_id(str(number)), "m", "b", 100, chains, "7", split=Split.SEARCH)
        for number in range(3)
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(map(format_recording_line, questions)))
    return path


@pytest.fixture
def store(tmp_path: Path, recordings: Path) -> Path:
    place = tmp_path / "s.db"
    done = CliRunner().invoke(app, ["import", "jsonl", str(recordings), "--store", str(place)])
    assert done.exit_code == 0, done.output
    return place


COMMANDS = {
    "evaluate --recordings r.jsonl --betas 1 --shuffles 1 --max-branches 4 --json": ("--json", ".json"),
    "evaluate --recordings r.jsonl --betas 1 --shuffles 1 --max-branches 4 --plot": ("--plot", ".svg"),
    "calibrate --recordings r.jsonl --betas 1 --shuffles 1 --max-branches 4 --engine local --out": ("--out", ".json"),
    "signals --recordings r.jsonl --json": ("--json", ".json"),
    "label --store s.db --json": ("--json", ".json"),
    "parity --store s.db --json": ("--json", ".json"),
    "parity --store s.db --plot": ("--plot", ".png"),
    "store export --store s.db": ("export", ".jsonl"),
    "gate single --recordings r.jsonl --ledger ledger --engine local --report": ("--report", ".json"),
    "gate single --recordings r.jsonl --plan --engine local --report": ("--report", ".json"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", [CARD, "class Mine: ...\n", "beta = 0.5\n"], ids=["card", "controller", "config"])
@pytest.mark.usefixtures("store")
def test_no_command_replaces_a_file_of_another_kind(
    tmp_path: Path, command: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    option, ending = COMMANDS[command]
    file = Path(f"mine{ending}")
    file.write_text(content)
    done = CliRunner().invoke(app, [*command.split(), str(file)])
    assert (done.exit_code, file.read_text()) == (2, content), done.output
    message = " ".join(done.output.split())
    assert f"{option} {file}: the file is not " in message
    assert ADVICE in message


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if command.split()[0] in ("evaluate", "calibrate", "signals", "label", "store")],
)
@pytest.mark.usefixtures("store")
def test_a_command_replaces_what_it_wrote(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, ending = COMMANDS[command]
    file = Path(f"mine{ending}")
    for _ in range(2):
        done = CliRunner().invoke(app, [*command.split(), str(file)])
        assert done.exit_code == 0, done.output
        assert file.stat().st_size
        if ending == ".json":
            json.loads(file.read_text())
