"""Warnings about recordings whose probes cost nothing or give no answer, and one rule for their cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from controllers.loading import Spec
from discovery.commands.gate import judge_in_subprocess
from discovery.data.importers import format_recording_line
from discovery.data.recordings import Cell, RecordedBranch, RecordedQuestion, Split, intern_answers, question_id
from discovery.evaluation.calibration import read_calibrations
from discovery.evaluation.engines import EngineName
from discovery.evaluation.evaluate import EMPTY_PROBES, FREE_PROBES, probe_problem, probe_warnings
from discovery.promotion.gate import GateJob
from discovery.promotion.searched_questions import charged_probe_tokens
from proxy.cli import app

PROBING = """
from controllers import TO_END, advance, answer, branch, probe


class Probing:
    def __init__(self, beta):
        self.beta = beta

    def decide(self, state):
        if not state.width:
            return [branch()]
        if state.rounds == 1 and state.active:
            return [probe(0)]
        return [advance(i, TO_END) for i in state.active] or [answer(state.leader())]
"""


def asked(
    probes: Sequence[str | None], costs: Sequence[int] = (), number: int = 0, split: Split = Split.SEARCH
) -> RecordedQuestion:
    branches = [RecordedBranch(probes, 100 * len(probes) + 50, "7", costs)] * 4
    return RecordedQuestion(question_id(f"{split} {number}"), "m", "b", 100, branches, "7", split=split)


@pytest.mark.parametrize(
    ("recorded", "charged", "problem"),
    [
        ([asked(["7", "7"])], None, FREE_PROBES),
        ([asked(["7", "7"])], 20, ""),
        ([asked(["7", "7"])], 0, ""),
        ([asked(["7", "7"], [5, 5])], None, ""),
        ([asked(["7"]), asked(["7"], [5])], None, ""),
        ([asked([None, None])], None, EMPTY_PROBES),
        ([asked([None, None])], 20, EMPTY_PROBES),
        ([asked([None]), asked(["7"])], None, FREE_PROBES),
        ([asked([])], None, ""),
        ([replace(asked(["7"]), sampling={"branch": "reply"})], None, ""),
    ],
)
def test_probes_that_are_free_or_without_answers_are_named(
    recorded: list[RecordedQuestion], charged: int | None, problem: str
) -> None:
    assert probe_problem([intern_answers(one) for one in recorded], charged) == problem


def test_a_warning_names_the_first_cell_and_counts_the_others() -> None:
    first, second, third = (Cell(name, "b", Split.SEARCH) for name in "mno")
    assert probe_warnings({first: "", second: "free"}) == ["n b search: free"]
    assert probe_warnings({first: "free", second: "free"}) == ["m b search and 1 more cell: free"]
    assert probe_warnings(dict.fromkeys((first, second, third), "free")) == ["m b search and 2 more cells: free"]
    assert probe_warnings({first: "free", second: "empty"}) == ["m b search: free", "n b search: empty"]


@pytest.mark.parametrize(
    ("controllers", "options", "warned"),
    [("cmc", (), True), ("asc,cmc", (), True), ("asc", (), False), ("cmc", ("--probe-tokens", "20"), False)],
)
def test_the_evaluate_command_warns_of_free_probes_if_a_controller_probes(
    tmp_path: Path, controllers: str, options: tuple[str, ...], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recordings = tmp_path / "recordings.jsonl"
    recordings.write_text(format_recording_line(asked(["7", "7"])))
    chosen = ["--controllers", controllers, "--betas", "0", "--shuffles", "1", "--max-branches", "4"]
    with caplog.at_level(logging.WARNING):
        done = CliRunner().invoke(app, ["evaluate", "--recordings", str(recordings), *chosen, *options])
    assert done.exit_code == 0, done.output
    assert (FREE_PROBES in caplog.text) == warned


def test_the_calibrate_command_charges_probes_and_its_file_says_so(tmp_path: Path) -> None:
    recordings, out = tmp_path / "recordings.jsonl", tmp_path / "calibration.json"
    recordings.write_text("".join(format_recording_line(asked(["7"] * 9, (), i)) for i in range(2)))
    chosen = ["--controllers", "cmc,asc", "--betas", "0", "--shuffles", "1", "--max-branches", "4"]
    tokens, charges = [], []
    for options in ((), ("--probe-tokens", "20")):
        command = ["calibrate", "--recordings", str(recordings), "--out", str(out), "--engine", "local"]
        done = CliRunner().invoke(app, [*command, *chosen, *options])
        assert done.exit_code == 0, done.output
        assert ("tokens per probe: 20" in done.output) == bool(options)
        calibration = read_calibrations(out)["m"]
        tokens.append(calibration.points[0].tokens)
        charges.append([one.probe_tokens for one in calibration.all])
    assert charges == [[None, None], [20, 20]]
    assert tokens[1] > tokens[0]
    assert out.read_text().count('"probe_tokens": 20') == 2


@pytest.mark.process
def test_the_gate_counts_probes_as_recorded_or_as_given_and_says_if_the_search_did_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recordings, file = tmp_path / "recordings.jsonl", tmp_path / "mine.py"
    recordings.write_text("".join(format_recording_line(asked(["7", "7"], (), i, Split.HELD_OUT)) for i in range(6)))
    file.write_text(PROBING)
    assert Spec("mine", PROBING).needs_probes
    about = {"betas": "0.5", "shuffles": 1, "max_branches": 4, "engine": EngineName.LOCAL}
    job = GateJob(str(file), "single", recordings, tmp_path / "ledger", tmp_path / "report", "now", "me", **about)  # type: ignore[arg-type]
    free = judge_in_subprocess(job)
    assert (free.probe_tokens, free.cells[0].finalist[0]["tokens"]) == (None, 250)
    assert FREE_PROBES in caplog.text
    assert "the search for" not in caplog.text
    file.with_suffix(".json").write_text(json.dumps({"settings": {"probe_tokens": 20}}))
    assert charged_probe_tokens(str(file)) == 20
    caplog.clear()
    again = judge_in_subprocess(job)
    assert again == free
    assert "charged 20 tokens per probe, and this gate charges what is recorded; --probe-tokens 20 cou" in caplog.text
    caplog.clear()
    kept = judge_in_subprocess(replace(job, probe_tokens=20))
    assert kept == free
    assert "mine was judged before, with what is recorded per probe; that verdict stands" in caplog.text
    caplog.clear()
    charged = judge_in_subprocess(replace(job, probe_tokens=20, ledger=tmp_path / "other"))
    assert (charged.probe_tokens, charged.cells[0].finalist[0]["tokens"]) == (20, 270)
    assert caplog.text == ""
    assert json.loads((tmp_path / "report").read_bytes())["probe_tokens"] == 20
