"""The sequential gate: looks at growing recordings spend one level together, and stop at a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controllers.loading import Spec
from discovery.data.recordings import LabelSource, RecordedQuestion, Split
from discovery.errors import GateError
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import UNEVEN_FEEDBACK
from discovery.evaluation.paired_statistics import sequential_alpha
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.score_set import ScoreSet, score_controllers
from discovery.promotion import comparison
from discovery.promotion.comparison import Comparison
from discovery.promotion.conditions import GateTerms
from discovery.promotion.gate import run_gate
from discovery.promotion.ledger import Ledger
from discovery.promotion.selected_source import shorten_id
from discovery.promotion.sequential_gate import AXIS_QUESTIONS, run_sequential_gate
from discovery.promotion.verdict import GateReport, GateVerdict, SequenceReport, report_of
from tests.discovery.evaluation.test_evaluate import Given
from tests.discovery.promotion.test_gate import LONGER, SHORTER, question

BETAS = (0.0, 0.5, 1.0)
SHORTEST = Spec("short_m_at_k")  # right where short chains are
VOTES = Spec("self_consistency")


def recorded(count: int, split: Split = Split.HELD_OUT, start: int = 0, better: bool = True) -> list[RecordedQuestion]:
    """Return questions of one model. The short chains are right, or the long ones."""
    shorter, longer = (SHORTER, LONGER) if better else (LONGER, SHORTER)
    return [question(start + number, "m", split, shorter, longer) for number in range(count)]


def look(
    recordings: Sequence[RecordedQuestion],
    ledger: Path,
    split: Split = Split.HELD_OUT,
    models: str = "",
    **changes: Any,
) -> GateReport:
    source = Given(*recordings)
    about: dict[str, Any] = {"terms": GateTerms(bound=100), "shuffles": 1, "finalist": SHORTEST} | changes
    return run_sequential_gate(
        source,
        [cell for cell in source.cells() if cell.split is split and cell.model in (models or cell.model)],
        Comparison(
            champion=VOTES,
            engine=make_engine(EngineName.LOCAL),
            rules=ReplayRules(16),
            betas=BETAS,
            now="now",
            who="me",
            **about,
        ),
        ledger,
    )


def sequence(report: GateReport) -> SequenceReport:
    assert report.sequence is not None
    return report.sequence


def test_looks_go_on_until_the_test_decides_and_spend_one_level(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    reports = [look(recorded(count), path) for count in (14, 18, 60)]
    assert [report.verdict for report in reports] == [GateVerdict.UNDECIDED, GateVerdict.UNDECIDED, GateVerdict.PROMOTE]
    assert [report.questions for report in reports] == [count - AXIS_QUESTIONS for count in (14, 18, 60)]
    assert [sequence(report).look for report in reports] == [1, 2, 3]
    assert {(report.k, report.alpha) for report in reports} == {(1, sequential_alpha(1, 0.05))}
    assert reports[0].more is not None
    assert reports[2].p <= reports[2].alpha
    assert reports[2].interval is not None
    assert 0 < reports[2].interval[0] < reports[2].delta_afs < reports[2].interval[1]
    assert report_of(reports[2].as_json() | {}) == reports[2]
    assert look(recorded(80), path) == reports[2]  # it has ended
    lines = Ledger(path).judgements()
    assert [line.k for line in lines] == [1, 1, 1]
    assert len({line.sequence for line in lines}) == 1
    assert Ledger(path).next_k([item.question for item in recorded(60)]) == 2


def test_values_stay_as_they_were_and_nothing_new_is_no_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger"
    first = look(recorded(15), path)
    second = look(recorded(20), path)
    gains = sequence(first).gains
    assert list(sequence(second).gains.items())[: len(gains)] == list(gains.items())
    assert sequence(second).axes == sequence(first).axes
    monkeypatch.setattr(comparison, "score_controllers", None)  # nothing is scored again
    assert look(recorded(20), path) == second
    assert len(Ledger(path).judgements()) == 2


def test_a_finalist_without_a_worthwhile_gain_is_rejected_as_futile(tmp_path: Path) -> None:
    terms = GateTerms(bound=100, gain=30)
    report = look(recorded(60, better=False), tmp_path / "ledger", terms=terms)
    assert report.verdict is GateVerdict.REJECT
    assert {"better", "worthwhile"} <= {condition.name for condition in report.failed}


def test_curves_come_from_the_other_splits_if_they_have_enough_questions(tmp_path: Path) -> None:
    others = [*recorded(6, Split.SEARCH), *recorded(6, Split.VALIDATION)]
    report = look([*recorded(8), *others], tmp_path / "ledger")
    assert (report.questions, sequence(report).axis_questions) == (8, [])
    unknown = [replace(item, reference=None) for item in others]
    for number, too_few in enumerate((others[:3], unknown)):
        report = look([*recorded(12), *too_few], tmp_path / f"other{number}")
        assert (report.questions, len(sequence(report).axis_questions)) == (12 - AXIS_QUESTIONS, AXIS_QUESTIONS)


def test_a_look_says_which_models_its_selection_leaves_out(tmp_path: Path) -> None:
    both = [*recorded(14), *(replace(item, model="other") for item in recorded(14))]
    report = look(both, tmp_path / "ledger", models="m")
    assert (report.models_left_out, report.benchmarks_left_out) == (["other"], [])
    (line,) = Ledger(tmp_path / "ledger").judgements()
    assert line.report["models_left_out"] == ["other"]
    assert look(recorded(14), tmp_path / "ledger").models_left_out == []  # nothing else is recorded any more


def test_a_question_with_missing_branches_waits(tmp_path: Path) -> None:
    recordings = recorded(16)
    last = max(recordings, key=lambda item: item.question)
    partly = [replace(item, branches=item.branches[:5]) if item is last else item for item in recordings]
    first = look(partly, tmp_path / "ledger")
    assert (first.questions, sequence(first).waiting) == (5, 1)
    second = look(recordings, tmp_path / "ledger")
    assert (second.questions, sequence(second).waiting) == (6, 0)
    assert shorten_id(last.question) in sequence(second).gains


def judged_at_once(recordings: Sequence[RecordedQuestion], ledger: Path) -> GateReport:
    """Return another finalist's judgement for a fixed number of questions."""
    source, engine = Given(*recordings), make_engine(EngineName.LOCAL)
    asked = Comparison(Spec("asc@4"), VOTES, engine, ReplayRules(16), BETAS, 1, "now", "me")
    return run_gate(source, source.cells(), asked, ledger)


def test_questions_of_another_judgement_at_the_same_level_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    first, other = recorded(14), recorded(6, start=100)
    assert look(first, path).k == 1
    assert judged_at_once(other, path).k == 1
    report = look([*first, *other, *recorded(4, start=200)], path)
    assert (report.questions, sequence(report).excluded) == (8, 6)


def meanwhile(monkeypatch: pytest.MonkeyPatch, judge: Callable[[], object]) -> None:
    """Let `judge` run to its end during the next replay."""

    def replay(*arguments: Any) -> ScoreSet:
        monkeypatch.setattr(comparison, "score_controllers", score_controllers)
        judge()
        return score_controllers(*arguments)

    monkeypatch.setattr(comparison, "score_controllers", replay)


def test_a_sequence_begins_at_the_next_level_if_another_took_its_level_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"
    meanwhile(monkeypatch, lambda: look(recorded(14), path, finalist=Spec("single")))
    report = look(recorded(14), path)
    assert (report.k, report.alpha) == (2, sequential_alpha(2, 0.05))
    assert [line.k for line in Ledger(path).judgements()] == [1, 2]


def test_questions_that_another_judgement_took_at_the_level_meanwhile_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"
    first, other = recorded(14), recorded(6, start=100)
    assert look(first, path).k == 1
    meanwhile(monkeypatch, lambda: judged_at_once(other, path))
    report = look([*first, *other, *recorded(4, start=200)], path)
    assert (report.questions, sequence(report).excluded) == (8, 6)
    assert [line.k for line in Ledger(path).judgements()] == [1, 1, 1]


def test_a_look_is_refused_if_feedback_has_chosen_tested_questions_by_their_outcome(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    right = [replace(item, label_source=LabelSource.FEEDBACK) for item in recorded(14)]
    first = look(right, path)
    more = recorded(12, start=100)
    wrong = replace(more[0], reference=None, judged_wrong=True)
    with pytest.raises(GateError, match="4 tested questions are labelled by feedback and no longer count"):
        look([*right, *more[1:], wrong], path)
    assert len(Ledger(path).judgements()) == 1
    stated = replace(more[0], label_source=LabelSource.FEEDBACK)
    assert look([*right, *more[1:], stated], path).questions == first.questions + 12


def test_tested_questions_whose_recordings_are_gone_stay_beside_others_that_feedback_chose(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    more = recorded(12, start=100)
    chosen = replace(more[1], label_source=LabelSource.FEEDBACK)  # no look has tested it
    wrong = replace(more[0], reference=None, judged_wrong=True)
    assert look(recorded(14), path).questions == 4
    assert look([*more[2:], chosen, wrong], path).questions == 14


def test_a_look_warns_once_that_labels_are_from_feedback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    look([replace(item, label_source=LabelSource.FEEDBACK) for item in recorded(14)], tmp_path / "ledger")
    assert [record.message for record in caplog.records if UNEVEN_FEEDBACK in record.message] == [
        f"m b held-out: right answers are known by feedback: {UNEVEN_FEEDBACK}"
    ]


def test_other_settings_are_another_sequence_at_the_next_level(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    assert look(recorded(14), path).k == 1
    assert look(recorded(14), path, shuffles=2).k == 2
    assert look(recorded(18), path).k == 1


@pytest.mark.parametrize(
    ("recordings", "changes", "message"),
    [
        (recorded(9), {}, "9 questions are too few to fix the budgets"),
        (recorded(10), {}, "of which the first 10 only fix the budgets"),
        (recorded(14), {"terms": GateTerms(bound=0)}, "must both be above 0 points"),
        ([*recorded(14), *(replace(item, benchmark="c") for item in recorded(14))], {}, "takes the questions of one"),
        ([*recorded(4), *(replace(item, model="n") for item in recorded(4, start=50))], {}, "with every model"),
        (recorded(14), {"finalist": VOTES}, "is identical to the champion"),
    ],
)
def test_a_sequence_that_cannot_begin_spends_nothing(
    tmp_path: Path, recordings: list[RecordedQuestion], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(GateError, match=message):
        look(recordings, tmp_path / "ledger", **changes)
    assert Ledger(tmp_path / "ledger").judgements() == []
