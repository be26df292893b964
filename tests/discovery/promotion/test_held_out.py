"""Attacks on the rule that only questions that no search has seen promote a controller."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from controllers.rollout_state import RolloutStage, RolloutState
from discovery.commands import promote as promotion_commands
from discovery.commands.promote import card_of, discovery_card, install, promote_known
from discovery.data.importers import format_recording_line
from discovery.data.recordings import RecordedQuestion, Split
from discovery.errors import GateError, PromotionError
from discovery.promotion import comparison
from discovery.promotion.gate import GateJob
from discovery.promotion.ledger import Ledger
from discovery.promotion.registry import Registry
from discovery.promotion.searched_questions import SearchedQuestions, searched_questions, with_searched
from discovery.promotion.verdict import GateReport, GateVerdict
from proxy.cli import app
from tests.discovery.evaluation.test_evaluate import Given
from tests.discovery.promotion.examples import FORCED, HELD_OUT_CELLS, ME, spec
from tests.discovery.promotion.test_gate import FIRST, run
from tests.discovery.promotion.test_sequential_gate import SHORTEST, look, recorded

OPEN = pytest.mark.parametrize("split", [Split.SEARCH, Split.VALIDATION])


def failed(report: GateReport) -> list[str]:
    return [one.name for one in report.failed]


def written(folder: Path, report: GateReport | dict[str, Any]) -> Path:
    """Write a report and return its path."""
    path = folder / "report.json"
    content = report.as_json() if isinstance(report, GateReport) else report
    path.write_text(json.dumps(content))
    return path


def passing(**changes: Any) -> dict[str, Any]:
    """Return a report of the gate that promotes `spec(1)`, with the fields that a promotion reads."""
    return {"digest": spec(1).digest, "verdict": "promote", "headline": "better", "cells": HELD_OUT_CELLS} | changes


def questions(split: Split) -> list[RecordedQuestion]:
    return recorded(20, split)


def judged(folder: Path, split: Split, **changes: Any) -> GateReport:
    folder.mkdir(exist_ok=True)
    return run(Given(*questions(split)), SHORTEST, folder / "ledger", split, shuffles=1, **changes)


def test_a_better_finalist_is_promoted_by_held_out_questions(tmp_path: Path) -> None:
    report = judged(tmp_path, Split.HELD_OUT)
    assert (report.verdict, failed(report)) == (GateVerdict.PROMOTE, [])
    assert report.conditions[0].words == "held-out questions"


@OPEN
def test_a_verdict_on_a_split_that_searches_may_see_is_not_to_promote(tmp_path: Path, split: Split) -> None:
    report = judged(tmp_path, split)
    assert (report.verdict, failed(report), report.more) == (GateVerdict.UNDECIDED, ["held-out"], None)
    assert report.failed[0].words == f"questions of the {split} split, which searches may see; judge on held-out ones"
    registry = Registry(tmp_path / "registry")
    with pytest.raises(PromotionError, match="the gate's verdict is 'undecided', not 'promote'"):
        install(registry, SHORTEST, card_of(SHORTEST, written(tmp_path, report)), RolloutStage.SHADOW, 0, ME)
    assert registry.read() == RolloutState()


@OPEN
def test_a_promotion_that_an_earlier_gate_recorded_is_not_returned(
    tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison.Comparison, "count_searched", lambda *_: None)
    report = judged(tmp_path / "now", split)
    earlier = report.with_conditions([one for one in report.conditions if one.name != "held-out"])
    assert earlier.verdict is GateVerdict.PROMOTE
    ledger = Ledger(tmp_path / "ledger")
    named = {"digest": SHORTEST.digest, "champion": report.champion_digest, "questions": ["0" * 16]}
    facts = {"k": 1, "p": report.p, "verdict": "promote", "created": "then", "who": "me"}
    ledger.append(split=report.split, report=earlier.as_json(), **named, **facts)
    again = judged(tmp_path, split)
    assert (again.verdict, failed(again)) == (GateVerdict.UNDECIDED, ["held-out"])
    assert len(ledger.judgements()) == 1


@pytest.mark.parametrize(
    ("cells", "splits"),
    [
        ([{"split": "search"}], "search"),
        ([{"split": "validation"}], "validation"),
        ([*HELD_OUT_CELLS, {"split": "search"}], "held-out and search"),
        ([], "unknown"),
        ([{}], "unknown"),
        (None, "unknown"),
    ],
)
def test_a_report_with_questions_that_were_not_held_out_promotes_only_by_force(
    tmp_path: Path, cells: Any, splits: str
) -> None:
    registry = Registry(tmp_path / "registry")
    card = card_of(spec(1), written(tmp_path, passing(cells=cells)))
    message = f"questions of the {splits} split, which searches may see; run the gate on held-out questions, or use --f"
    for model in (None, "small"):
        with pytest.raises(PromotionError, match=message):
            install(registry, spec(1), card, RolloutStage.SHADOW, 0, ME, model)
    assert registry.read() == RolloutState()
    install(registry, spec(1), card, RolloutStage.SHADOW, 0, FORCED)
    assert (registry.card(spec(1).digest)["forced"], registry.audit()[-1]["forced"]) == (True, True)


def test_a_controller_that_an_earlier_version_installed_by_such_a_report_stays_where_it_is(tmp_path: Path) -> None:
    registry, digest = Registry(tmp_path / "registry"), spec(1).digest
    card = card_of(spec(1), written(tmp_path, passing(cells=[{"split": "search"}])))
    registry.install(spec(1), card, RolloutStage.SHADOW, 0, ME)
    for stage in (RolloutStage.CANARY, RolloutStage.CHAMPION):
        with pytest.raises(PromotionError, match="report is about questions of the search split"):
            promote_known(registry, digest[:12], stage, 0.1, ME)
    assert registry.read().default.champion is None
    promote_known(registry, digest[:12], RolloutStage.CHAMPION, 0, FORCED)
    assert (registry.card(digest)["forced"], registry.audit()[-1]["forced"]) == (True, True)


def test_a_forced_report_lends_its_models_to_no_later_report(tmp_path: Path) -> None:
    registry, digest = Registry(tmp_path / "registry"), spec(1).digest
    for rejected in (passing(verdict="reject"), passing(verdict="reject", model="large")):
        install(registry, spec(1), card_of(spec(1), written(tmp_path, rejected)), RolloutStage.SHADOW, 0, FORCED)
        card = card_of(spec(1), written(tmp_path, passing(model="small")))
        install(registry, spec(1), card, RolloutStage.SHADOW, 0, ME, "small")
        assert (registry.card(digest)["models"], registry.card(digest)["forced"]) == (["small"], False)
        for model in (None, "large"):
            with pytest.raises(PromotionError, match="passed the gate on model small only"):
                promote_known(registry, digest, RolloutStage.CHAMPION, 0, ME, model)


@pytest.mark.parametrize("cells", [[{"split": "search"}], [*HELD_OUT_CELLS, {"split": "validation"}], [{}], None])
@pytest.mark.parametrize("model", [None, "large"])
def test_a_report_on_questions_that_searches_see_lends_its_models_to_no_later_report(
    tmp_path: Path, cells: Any, model: str | None
) -> None:
    registry, digest = Registry(tmp_path / "registry"), spec(1).digest
    earlier = card_of(spec(1), written(tmp_path, passing(cells=cells)))
    earlier = earlier if model is None else {**earlier, "models": [model]}
    registry.install(spec(1), earlier, RolloutStage.SHADOW, 0, ME, model)  # as an earlier version did
    card = card_of(spec(1), written(tmp_path, passing(model="small")))
    install(registry, spec(1), card, RolloutStage.SHADOW, 0, ME, "small")
    assert registry.card(digest)["models"] == ["small"]
    for other in (None, "large"):
        with pytest.raises(PromotionError, match="passed the gate on model small only"):
            promote_known(registry, digest, RolloutStage.CHAMPION, 0, ME, other)


# Questions that the search has seen, under another split


def searched(folder: Path, count: int, split: Split = Split.HELD_OUT) -> SearchedQuestions:
    """Write a card beside mine.py that lists `count` questions as searched, and return what is read of it."""
    return searched_among(folder, recorded(60, split)[:count])


def searched_among(folder: Path, recordings: Sequence[RecordedQuestion]) -> SearchedQuestions:
    """Write a card beside mine.py that lists these questions as searched, and return what is read of it."""
    card = {"digest": "of another version", "run": "a hash", "data": {"questions": 9}}
    seen = [one.question for one in recordings]
    (folder / "mine.json").write_text(json.dumps(with_searched(card, seen)))
    known = searched_questions(str(folder / "mine.py"))
    assert known is not None
    assert not known.hashes.intersection(question[:16] for question in seen)
    return known


def test_held_out_questions_that_the_search_has_seen_do_not_promote(tmp_path: Path) -> None:
    report = judged(tmp_path, Split.HELD_OUT, searched=searched(tmp_path, 3))
    assert (report.verdict, failed(report)) == (GateVerdict.UNDECIDED, ["held-out"])
    assert report.failed[0].words == "the search that found it has seen 3 of the questions; judge on others"
    assert judged(tmp_path, Split.HELD_OUT) == report  # without its card as well
    other = judged(tmp_path / "other", Split.HELD_OUT)
    assert other.verdict is GateVerdict.PROMOTE
    again = judged(tmp_path / "other", Split.HELD_OUT, searched=searched(tmp_path, 3))
    assert failed(again) == ["held-out"]  # the card came later than the judgement


def test_questions_that_the_search_has_not_seen_promote(tmp_path: Path) -> None:
    report = judged(tmp_path, Split.HELD_OUT, searched=searched(tmp_path, 20, Split.SEARCH))
    assert report.verdict is GateVerdict.PROMOTE
    assert report.conditions[0].words == "held-out questions, none of which the search has seen"


@pytest.mark.parametrize("card", [None, "", "{", "[]", "{}", '{"data": []}', '{"run": "", "data": {"searched": 7}}'])
def test_without_a_card_of_a_search_its_questions_are_unknown(tmp_path: Path, card: str | None) -> None:
    if card is not None:
        (tmp_path / "mine.json").write_text(card)
    assert searched_questions(str(tmp_path / "mine.py")) is None
    assert searched_questions("cmc") is None


def test_the_registry_keeps_a_discovery_card_without_the_questions(tmp_path: Path) -> None:
    searched(tmp_path, 3)
    kept = {"digest": "of another version", "run": "a hash", "data": {"questions": 9}}
    assert discovery_card(tmp_path / "mine.py") == {"discovery": kept}


@pytest.mark.parametrize("split", Split)
def test_a_sequence_promotes_by_unseen_questions_only(tmp_path: Path, split: Split) -> None:
    asked, ledger = recorded(60, split), tmp_path / "ledger"
    report = look(asked, ledger, split=split)
    if split is Split.HELD_OUT:
        assert report.verdict is GateVerdict.PROMOTE
        report = look(asked, ledger, searched=searched(tmp_path, 1))
    assert (report.verdict, failed(report), report.more) == (GateVerdict.UNDECIDED, ["held-out"], None)


SEEN_ONE = "the search that found it has seen 1 of the questions; judge on others"


@pytest.mark.parametrize("has_card", [True, False])
def test_a_sequence_remembers_a_searched_question_whose_recordings_have_gone(tmp_path: Path, has_card: bool) -> None:
    every, ledger = recorded(60), tmp_path / "ledger"
    gone = max(every[:20], key=lambda one: one.question)
    seen = searched_among(tmp_path, [gone])
    first = look(every[:20], ledger, searched=seen)
    assert "held-out" in failed(first)
    rest = [one for one in every if one is not gone]
    report = look(rest, ledger, searched=seen if has_card else None)
    assert (report.verdict, failed(report), report.more) == (GateVerdict.UNDECIDED, ["held-out"], None)
    assert report.failed[0].words == SEEN_ONE
    assert look(rest, ledger, searched=seen) == report  # nothing new


def test_a_sequence_that_has_ended_promotes_no_more_if_a_question_that_has_gone_was_searched(tmp_path: Path) -> None:
    every, ledger = recorded(60), tmp_path / "ledger"
    gone = max(every, key=lambda one: one.question)
    assert look(every, ledger).verdict is GateVerdict.PROMOTE
    rest = [one for one in every if one is not gone]
    report = look(rest, ledger, searched=searched_among(tmp_path, [gone]))
    assert (report.verdict, failed(report), report.failed[0].words) == (GateVerdict.UNDECIDED, ["held-out"], SEEN_ONE)


# The commands


@pytest.mark.parametrize("asked", [["mine.py"], ["single", "--champion", "mine.py"], ["mine.py", "--plan"]])
def test_a_report_never_replaces_the_card_of_a_search(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FIRST)
    Path("mine.json").write_text("{}")
    Path("same.json").symlink_to("mine.json")
    message = "the card of the search for mine.py is kept there; name another file, such as mine.report.json"
    options = ["--recordings", "none.jsonl", "--ledger", "ledger", "--report"]
    for report in ("mine.json", str(tmp_path / "mine.json"), "same.json"):
        done = CliRunner().invoke(app, ["gate", *asked, *options, report])
        assert (done.exit_code, f"--report {report}: {message}" in done.output) == (2, True), done.output
    assert Path("mine.json").read_text() == "{}"
    job = GateJob("mine.py", "single", Path("none.jsonl"), Path("ledger"), Path("mine.json"), "now", "me")
    with pytest.raises(GateError, match=message):
        job.run()


def test_promote_passes_the_tokens_per_probe_on_to_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[GateJob] = []

    def refuse(job: GateJob) -> GateReport:
        jobs.append(job)
        raise GateError("not judged here")

    monkeypatch.setattr(promotion_commands, "judge_in_subprocess", refuse)
    file = tmp_path / "mine.py"
    file.write_text(FIRST)
    place = ["--registry", str(tmp_path / "registry"), "--recordings", str(tmp_path / "none.jsonl")]
    for options in ([], ["--probe-tokens", "20"]):
        done = CliRunner().invoke(app, ["promote", str(file), "--as", "shadow", *place, *options])
        assert (done.exit_code, "not judged here" in done.output) == (2, True), done.output
    assert [job.probe_tokens for job in jobs] == [None, 20]


@pytest.mark.process
def test_the_commands_refuse_a_verdict_on_the_search_split(tmp_path: Path) -> None:
    recordings, file, report = tmp_path / "recordings.jsonl", tmp_path / "mine.py", tmp_path / "report.json"
    recordings.write_text("".join(format_recording_line(one) for one in questions(Split.SEARCH)))
    file.write_text(FIRST)
    options = ["--champion", "self_consistency", "--ledger", str(tmp_path / "ledger"), "--report", str(report)]
    quick = ["--betas", "0,0.5,1", "--shuffles", "1", "--max-branches", "16", "--engine", "local"]
    asked = ["gate", str(file), "--split", "search", "--recordings", str(recordings), *options, *quick]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "this verdict promotes nothing: searches may have seen the questions" in done.output
    assert "mine: undecided" in done.output
    assert json.loads(report.read_bytes())["cells"][0]["split"] == "search"
    promote = [
        "promote",
        str(file),
        "--registry",
        str(tmp_path / "registry"),
        "--as",
        "shadow",
        "--report",
        str(report),
    ]
    done = CliRunner().invoke(app, promote)
    assert (done.exit_code, "the gate's verdict is 'undecided'" in done.output) == (2, True)
    done = CliRunner().invoke(app, [*promote, "--force"])
    assert (done.exit_code, "FORCED" in done.output) == (0, True)
    done = CliRunner().invoke(app, [*promote, "--force"])
    assert (done.exit_code, "FORCED" in done.output) == (0, False)
    assert "is shadow already" in done.output
    assert len(Registry(tmp_path / "registry").audit()) == 1
