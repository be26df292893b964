"""Ablation: an evaluation can withhold signals that the recordings have and the controller declares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from discovery.data.importers import format_recording_line
from discovery.data.recordings import RecordedBranch, RecordedQuestion, question_id
from proxy.cli import app

SURE = RecordedBranch([], 20, "1", confidences=[990], lowests=[980])
UNSURE = RecordedBranch([], 20, "2", confidences=[100], lowests=[50])


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Return recordings in which one confident chain of four is right."""
    path = tmp_path / "recordings.jsonl"
    branches = [SURE, UNSURE, UNSURE, UNSURE]
    questions = [RecordedQuestion(question_id(str(n)), "m", "b", 32, branches, reference="1") for n in range(3)]
    path.write_text("".join(format_recording_line(question) for question in questions))
    return path


def evaluate(recordings: Path, *options: str) -> float:
    command = ["evaluate", "--recordings", str(recordings), "--controllers", "cisc", "--betas", "1", "--shuffles", "2"]
    done = CliRunner().invoke(app, [*command, "--max-branches", "4", "--json", "-", *options])
    assert done.exit_code == 0, done.output
    (figures,) = json.loads(done.stdout)
    return float(figures["accuracy"])


def test_a_controller_gets_all_signals_by_default(recordings: Path) -> None:
    assert evaluate(recordings) == evaluate(recordings, "--signals", "all") == 100


@pytest.mark.parametrize("signals", ["none", "probes"])
def test_withheld_signals_are_unknown_to_the_controller(recordings: Path, signals: str) -> None:
    assert evaluate(recordings, "--signals", signals) == 0


def test_the_named_signal_is_kept(recordings: Path) -> None:
    assert (
        evaluate(recordings, "--signals", "intervals") == evaluate(recordings, "--signals", "intervals,probes") == 100
    )


def test_an_unknown_signal_is_refused_with_the_existing_ones(recordings: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", "--recordings", str(recordings), "--signals", "length"])
    assert done.exit_code == 2
    assert "--signals: 'length' is not a signal; there are 'intervals', 'probes', and all and none" in done.output
