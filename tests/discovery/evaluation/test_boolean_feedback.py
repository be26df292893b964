"""Feedback that says only whether an answer was right chooses questions by their outcome: what counts beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from discovery.commands.gate import _show
from discovery.data.importers import format_recording_line, read_jsonl
from discovery.data.recordings import Cell, LabelSource, Origin, RecordedBranch, RecordedQuestion, Split, question_id
from discovery.errors import BadRecording, RecordingsNotFound
from discovery.evaluation.evaluate import DEFAULT_WEIGHTS, read_scorable
from discovery.evaluation.reference_answers import update_labels
from discovery.evaluation.scores import SelectedByOutcome
from discovery.evaluation.sources import StoreSource
from discovery.promotion.verdict import report_of
from discovery.store import Feedback, ServedEpisode, Store
from proxy.cli import app
from tests.discovery.evaluation.test_evaluate import Given
from tests.discovery.promotion.test_gate import quickly
from tests.discovery.promotion.test_sequential_gate import look
from tests.discovery.promotion.test_sequential_gate import recorded as sealed

CELL = Cell("m", "live", Split.SEARCH)
REFERENCED, RIGHT, STATED, WRONG, SILENT = "referenced", "right", "stated", "wrong", "silent"
FEEDBACK: Mapping[str, Any] = {RIGHT: True, STATED: "8", WRONG: False}
"""Feedback on the request of each question, whose served answer is 7."""


def recorded(text: str) -> RecordedQuestion:
    branches = [RecordedBranch([final], 150, final) for final in ("7", "7", "8", "9")]
    reference = "7" if text == REFERENCED else None
    about: dict[str, Any] = {"chat_template": "t", "request": f"r {text}", "split": Split.SEARCH, "origin": Origin.LIVE}
    return RecordedQuestion(question_id(text), "m", "live", 100, branches, reference, **about)


def episode(text: str, request: str = "") -> ServedEpisode:
    name = request or f"r {text}"
    about: dict[str, Any] = {"answer": "7", "question": question_id(text), "tenant": f"of {name}"}
    return ServedEpisode(name, name, "m", "cmc", "d", 0.5, 3, 4, {}, "answered", **about)


def said(request: str, value: Any, second: int = 0) -> Feedback:
    kind = {bool: "correct", str: "answer", float: "score"}[type(value)]
    return Feedback(f"{request} {second}", request, kind, json.dumps(value), f"2026-01-01T00:00:{second:02}")


def store(
    place: Path, *texts: str, more: tuple[Feedback | ServedEpisode | RecordedQuestion, ...] = (), min_margin: float = 1
) -> StoreSource:
    """Make a store of these questions with their feedback, label it and return it as a source."""

    async def fill() -> None:
        async with Store.open(place, create=True) as opened:
            await opened.add_all([*map(episode, texts), *map(recorded, texts)])
            await opened.add_all([said(f"r {text}", FEEDBACK[text]) for text in texts if text in FEEDBACK])
            await opened.add_all(more)
            await update_labels(opened, min_margin=min_margin)

    asyncio.run(fill())
    return StoreSource(place)


def sources(source: StoreSource) -> dict[str, str]:
    return {str(one.question): str(one.label_source) for one in read_scorable(source, CELL).recordings}


def test_beside_questions_judged_wrong_only_references_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = store(tmp_path / "s.db", REFERENCED, RIGHT, STATED, WRONG, SILENT)
    scorable = read_scorable(source, CELL)
    assert [one.question for one in scorable.recordings] == [question_id(REFERENCED)]
    assert scorable.selected == SelectedByOutcome(1, {LabelSource.FEEDBACK: 2})
    assert "m live search: questions judged wrong whose right answer is unknown: 1;" in caplog.text
    assert "chosen by their outcome" in caplog.text


def test_feedback_counts_if_no_question_is_judged_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = store(tmp_path / "s.db", REFERENCED, RIGHT, STATED, SILENT)
    assert sorted(sources(source).values()) == ["feedback", "feedback", "reference"]
    assert "accuracy is biased if clients judge right answers more often than wrong ones" in caplog.text


def test_a_question_judged_wrong_whose_right_answer_is_known_leaves_nothing_out(tmp_path: Path) -> None:
    again = (episode(WRONG, "again"), said("again", "8"))
    source = store(tmp_path / "s.db", RIGHT, WRONG, more=again)
    assert set(sources(source)) == {question_id(RIGHT), question_id(WRONG)}


def test_the_latest_feedback_on_a_request_decides(tmp_path: Path) -> None:
    source = store(tmp_path / "s.db", RIGHT, WRONG, SILENT, more=(said(f"r {WRONG}", 0.9, 1),))
    assert len(sources(source)) == 2
    source = store(tmp_path / "t.db", RIGHT, SILENT, more=(said(f"r {SILENT}", 0.1),))
    with pytest.raises(RecordingsNotFound, match="questions judged wrong whose right answer is unknown: 1;"):
        sources(source)


def test_another_request_of_the_question_judges_it_too(tmp_path: Path) -> None:
    source = store(tmp_path / "s.db", RIGHT, SILENT, more=(episode(SILENT, "again"), said("again", False)))
    with pytest.raises(
        RecordingsNotFound, match='Send the right answer as feedback \\("answer"\\), or give references'
    ):
        sources(source)


def test_votes_that_do_not_count_leave_a_question_judged_wrong(tmp_path: Path) -> None:
    voted = replace(recorded(WRONG), branches=[RecordedBranch(["8"], 150, "8")] * 4)
    judged = episode(WRONG), said(f"r {WRONG}", False)
    source = store(tmp_path / "s.db", REFERENCED, RIGHT, more=(voted, *judged), min_margin=0.5)
    (loaded,) = (one for one in source.load(CELL) if one.question == question_id(WRONG))
    assert (loaded.reference, loaded.label_source, loaded.judged_wrong) == ("8", LabelSource.CONSENSUS, True)
    scorable = read_scorable(source, CELL)
    assert [one.question for one in scorable.recordings] == [question_id(REFERENCED)]
    assert scorable.selected == SelectedByOutcome(1, {LabelSource.FEEDBACK: 1})
    counting = read_scorable(source, CELL, {**DEFAULT_WEIGHTS, LabelSource.CONSENSUS: None})
    assert len(counting.recordings) == 3
    assert counting.selected == SelectedByOutcome()
    (tmp_path / "x.jsonl").write_text("".join(map(format_recording_line, source.load(CELL))))
    assert read_jsonl(tmp_path / "x.jsonl") == source.load(CELL)


def test_an_export_keeps_which_questions_were_judged_wrong(tmp_path: Path) -> None:
    source = store(tmp_path / "s.db", RIGHT, WRONG)
    lines = "".join(map(format_recording_line, source.load(CELL)))
    (tmp_path / "x.jsonl").write_text(lines)
    assert [one.judged_wrong for one in read_jsonl(tmp_path / "x.jsonl")] == [False, True]
    assert lines.count("judged_wrong") == 1
    (tmp_path / "y.jsonl").write_text(format_recording_line(replace(recorded(REFERENCED), judged_wrong=True)))
    with pytest.raises(BadRecording, match="judged_wrong means that the right answer is unknown"):
        read_jsonl(tmp_path / "y.jsonl")


def test_evaluate_and_calibrate_say_what_they_leave_out(tmp_path: Path) -> None:
    place, figures = tmp_path / "s.db", tmp_path / "f.json"
    store(place, REFERENCED, RIGHT, STATED, WRONG)
    options = ["--recordings", str(place), "--shuffles", "2", "--betas", "1", "--max-branches", "4"]
    done = CliRunner().invoke(app, ["evaluate", *options, "--json", str(figures)])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(figures.read_text())
    assert (row["questions"], row["judged_wrong"], row["left_out_by_outcome"]) == (1, 1, {"feedback": 2})
    assert "left out: 1 judged wrong, and therefore 2 by feedback" in done.output
    made = ["calibrate", *options, "--engine", "local", "--out", str(tmp_path / "c.json")]
    done = CliRunner().invoke(app, made)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "c.json").read_text())["m"]["judged_wrong"] == 1


def judged(count: int) -> list[RecordedQuestion]:
    """Return held-out questions, of which one has its right answer by feedback and one was judged wrong."""
    first, second, *others = sealed(count)
    by_feedback = replace(first, label_source=LabelSource.FEEDBACK)
    return [by_feedback, replace(second, reference=None, judged_wrong=True), *others]


def test_the_gate_reports_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = quickly("single", tmp_path / "ledger", Given(*judged(8)))
    (cell,) = report.cells
    assert (cell.questions, cell.judged_wrong, cell.left_out_by_outcome) == (6, 1, {LabelSource.FEEDBACK: 1})
    _show(report)
    assert "m b held-out: left out: 1 judged wrong, and therefore 1 by feedback\n" in capsys.readouterr().out
    written = json.loads(json.dumps(report.as_json()))
    assert report_of(written) == report
    assert (written["cells"][0].pop("judged_wrong"), written["cells"][0].pop("left_out_by_outcome")) == (
        1,
        {"feedback": 1},
    )
    (earlier,) = report_of(written).cells  # as earlier versions wrote it
    assert earlier == replace(cell, judged_wrong=0, left_out_by_outcome={})
    _show(report_of(written))
    assert "judged wrong" not in capsys.readouterr().out


def test_each_look_of_a_sequence_reports_what_it_leaves_out(tmp_path: Path) -> None:
    for count in (16, 18):
        (cell,) = look(judged(count), tmp_path / "ledger").cells
        assert (cell.questions, cell.judged_wrong, cell.left_out_by_outcome) == (
            count - 12,
            1,
            {LabelSource.FEEDBACK: 1},
        )


def test_an_import_says_that_a_store_does_not_keep_what_was_judged_wrong(tmp_path: Path) -> None:
    source, lines = store(tmp_path / "s.db", RIGHT, WRONG), tmp_path / "x.jsonl"
    command = ["import", "jsonl", str(lines), "--store"]
    lines.write_text("".join(map(format_recording_line, source.load(CELL))))
    done = CliRunner().invoke(app, [*command, str(tmp_path / "t.db")])
    assert done.exit_code == 0, done.output
    assert "questions judged wrong whose right answer is unknown: 1; a store does not keep that" in done.stderr
    assert len(sources(StoreSource(tmp_path / "t.db"))) == 1  # labels by feedback count again
    lines.write_text("".join(format_recording_line(one) for one in source.load(CELL) if not one.judged_wrong))
    done = CliRunner().invoke(app, [*command, str(tmp_path / "u.db")])
    assert (done.exit_code, done.stderr) == (0, "")
