"""The plan of a judgement: its split of the variance, and the power that the planned questions really have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from controllers.loading import Spec
from discovery.commands.gate_plan import show_plan
from discovery.data.importers import format_recording_line
from discovery.data.recordings import Cell, LabelSource, RecordedQuestion, Split
from discovery.errors import GateError
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import UNEVEN_FEEDBACK, AnswerComparison
from discovery.evaluation.paired_statistics import questions_needed, sign_flip_p
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.promotion.comparison import Comparison
from discovery.promotion.conditions import GateTerms, afs_gains, pool_questions
from discovery.promotion.ledger import Ledger
from discovery.promotion.power_plan import (
    PlannedOrders,
    PowerPlan,
    VarianceSplit,
    make_plan,
    plan_row,
    split_variance,
)
from proxy.cli import app
from tests.discovery.evaluation.test_evaluate import Given
from tests.discovery.promotion.test_gate import question

TRUE = VarianceSplit(between=20.0, within=400.0, by_order=60.0)
BRANCHES, ORDERS = 32, 10


def halves(rng: np.random.Generator, questions: int) -> NDArray[np.float64]:
    """Return values of questions as two halves of the branches and two halves of the orders give them."""
    of_question = rng.normal(0, TRUE.between**0.5, questions)
    of_branches = rng.normal(0, (TRUE.within / (BRANCHES / 2)) ** 0.5, (2, 1, questions))
    of_orders = rng.normal(0, (TRUE.by_order / ORDERS) ** 0.5, (2, 2, questions))
    values: NDArray[np.float64] = of_question + of_branches + of_orders
    return values


def test_the_variance_is_split_by_its_sources() -> None:
    split = split_variance(halves(np.random.default_rng(1), 20_000), BRANCHES / 2, ORDERS)
    assert split == pytest.approx(TRUE, rel=0.06)
    assert split.at(BRANCHES, ORDERS) == pytest.approx(20 + 400 / 32 + 60 / 10, rel=0.05)


def plan_of(variance: VarianceSplit, accuracy: VarianceSplit, gain: float = 2.0) -> PowerPlan:
    """Return a plan without rows."""
    about: dict[str, Any] = {"finalist": "f", "champion": "c", "observed_gain": 0.0, "tokens_per_branch": 1000.0}
    return PowerPlan(
        gain=gain,
        power=0.8,
        k=1,
        alpha=0.03,
        measured_questions=100,
        measured_branches=BRANCHES,
        measured_orders=ORDERS,
        orders=PlannedOrders(ORDERS, ORDERS),
        max_branches=BRANCHES,
        variance=variance,
        accuracy_variance=accuracy,
        rows=[],
        recommended=None,
        interval=None,
        sequential=None,
        **about,
    )


NOTHING = VarianceSplit(0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("branches", [8, 32])
def test_the_planned_questions_have_the_promised_power(branches: int) -> None:
    rng = np.random.default_rng(2)
    estimated = split_variance(halves(rng, 400), BRANCHES / 2, ORDERS)
    row = plan_row(plan_of(estimated, NOTHING), GateTerms(), branches, 0.0)
    assert row.questions is not None
    assert row.tokens == row.questions * branches * 1000
    drawn = rng.normal(2.0, TRUE.at(branches, ORDERS) ** 0.5, (200, row.questions))
    power = np.mean([sign_flip_p(differences, 0.03) <= 0.03 for differences in drawn])
    assert 0.70 < power < 0.90


def test_more_branches_reduce_only_the_variance_within_a_question() -> None:
    plan = plan_of(TRUE, NOTHING)
    rows = [plan_row(plan, GateTerms(), branches, 0.0) for branches in (8, 32, 128, 10_000)]
    counts = [row.questions for row in rows]
    assert counts == sorted(counts, key=lambda count: -(count or 0))
    assert counts[-1] == questions_needed(2.0, (20 + 60 / 10 + 400 / 10_000) ** 0.5, 0.03)
    assert all(row.detectable == sorted(row.detectable, reverse=True) for row in rows)


def test_the_test_of_accuracy_may_need_more_questions_than_that_of_the_gain() -> None:
    noisy = VarianceSplit(900, 0, 0)
    row = plan_row(plan_of(NOTHING, noisy), GateTerms(), 8, 0.0)
    assert row.questions == questions_needed(3.0, 30, 0.05)
    assert plan_row(plan_of(NOTHING, noisy, gain=1e-4), GateTerms(margin=0), 8, 0.0).questions is None


# On recordings


def recorded(count: int, split: Split, branches: int = 16) -> list[RecordedQuestion]:
    """Return questions whose short chains are a little better, each with its own difficulty."""
    rng = np.random.default_rng([count, len(split)])
    questions = []
    for number in range(count):
        ease = rng.uniform(0.2, 0.8)
        item = question(number, "m", split, min(1.0, ease + 0.15), ease)
        questions.append(replace(item, branches=item.branches[:branches]))
    return questions


def compared(orders: int = 4, gain: float = 1.0, **terms: Any) -> Comparison:
    return Comparison(
        Spec("short_m_at_k"),
        Spec("self_consistency"),
        make_engine(EngineName.LOCAL),
        ReplayRules(16),
        (0.0, 0.5, 1.0),
        orders,
        "now",
        "me",
        GateTerms(gain=gain, **terms),
        AnswerComparison.AUTO,
    )


SEALED = Cell("m", "b", Split.HELD_OUT)


@pytest.mark.slow
def test_a_plan_from_recordings_has_the_promised_power_on_new_questions() -> None:
    pool = recorded(500, Split.HELD_OUT)
    measured = compared().replay(Given(*pool), [SEALED])
    gains = pool_questions(afs_gains(measured), measured)
    real = float(gains.mean())
    assert real > 0.5
    source = Given(*recorded(120, Split.SEARCH), *recorded(60, Split.VALIDATION))
    plan = make_plan(compared(gain=real), source, source.cells(), None)
    planned = questions_needed(real, plan.variance.at(16, 4) ** 0.5, plan.alpha)
    assert planned is not None
    drawn = np.random.default_rng(3).choice(gains, (200, planned))
    power = np.mean([sign_flip_p(differences, plan.alpha) <= plan.alpha for differences in drawn])
    assert 0.65 < power < 0.93  # the variance is estimated from 180 questions, with an error of about 10 %
    assert plan.interval is not None
    assert plan.recommended is not None
    assert plan.recommended.questions is not None
    assert plan.interval[0] < plan.recommended.questions < plan.interval[1]


class Guarded(Given):
    """Source whose held-out questions must not be read."""

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        assert cell.split is not Split.HELD_OUT
        return super().load(cell)


def test_a_plan_reads_no_held_out_question_and_takes_the_next_level(tmp_path: Path) -> None:
    sealed = recorded(6, Split.HELD_OUT)
    source = Guarded(*recorded(12, Split.SEARCH), *sealed)
    ledger = Ledger(tmp_path / "ledger")
    ids = [item.question[:16] for item in sealed]
    about: dict[str, Any] = {"split": "s", "digest": "d", "champion": "c", "p": 1.0, "created": "now", "who": "me"}
    ledger.append(questions=ids, k=1, verdict="undecided", report={}, **about)
    ledger.append(questions=ids, k=2, verdict="undecided", report={}, sequence="a", **about)
    ledger.append(questions=ids, k=2, verdict="reject", report={}, sequence="a", **about)
    searched = [item.question[:16] for item in recorded(12, Split.SEARCH)]
    ledger.append(questions=searched, k=1, verdict="reject", report={}, **about)
    plan = make_plan(compared(orders=2), source, source.cells(), ledger)
    assert (plan.k, plan.measured_questions, plan.measured_branches) == (3, 12, 16)
    assert [row.branches for row in plan.rows] == [4, 8, 16, 32]
    assert [row.limited for row in plan.rows][:2] == [1.0, 1.0]
    assert [row.limited for row in plan.rows][2:] == [1.0, None]
    assert plan.recommended is None or plan.recommended.branches == 16


def test_a_plan_leaves_out_the_live_requests_of_a_proxy(caplog: pytest.LogCaptureFixture) -> None:
    live = [replace(item, benchmark="live", reference=None) for item in recorded(6, Split.SEARCH)]
    source = Guarded(*recorded(12, Split.SEARCH), *live)
    assert make_plan(compared(orders=2), source, source.cells(), None).measured_questions == 12
    assert "left out: m live search" in caplog.text


def test_how_many_unrecorded_branches_would_be_opened_is_not_guessed() -> None:
    source = Guarded(*recorded(12, Split.SEARCH))
    terms = compared(orders=2)
    wide = replace(terms, rules=replace(terms.rules, max_branches=40))
    rows = make_plan(wide, source, source.cells(), None).rows
    assert [(row.branches, row.limited) for row in rows][-3:] == [(16, 1.0), (32, None), (40, None)]


@pytest.mark.parametrize(
    ("recordings", "comparison", "message"),
    [
        (recorded(4, Split.SEARCH), compared(), "at least 5 questions of the search and validation splits, not 4"),
        (recorded(9, Split.HELD_OUT), compared(), "not 0; held-out questions are not opened for it"),
        (
            [*recorded(9, Split.SEARCH), *(replace(item, benchmark="live") for item in recorded(3, Split.SEARCH))],
            compared(),
            "not 3 of m live; held-out questions are not opened for it; leave it out with --models or --benchmarks",
        ),
        (recorded(9, Split.SEARCH, branches=3), compared(), "3 branches per question are too few"),
        (recorded(9, Split.SEARCH), compared(orders=3), "an even number of branch orders, not 3"),
        (recorded(9, Split.SEARCH), compared(gain=0), "gain 0 must be above 0 points"),
    ],
)
def test_a_plan_that_cannot_be_made_says_what_is_missing(
    recordings: list[RecordedQuestion], comparison: Comparison, message: str
) -> None:
    source = Given(*recordings)
    with pytest.raises(GateError, match=message):
        make_plan(comparison, source, source.cells(), None)


@pytest.mark.parametrize("between", [0.0, 20.0])
def test_a_plan_without_variance_between_questions_says_that_it_is_rough(
    between: float, capsys: pytest.CaptureFixture[str]
) -> None:
    split = TRUE._replace(between=between)
    plan = replace(plan_of(split, split), measured_questions=30)
    show_plan(plan)
    assert ("the table is rough" in capsys.readouterr().out) is (between == 0)


def test_a_plan_that_all_allowed_branches_limit_says_when_they_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    source = Guarded(*recorded(12, Split.SEARCH))
    plan = make_plan(replace(compared(orders=2, gain=20.0), rules=ReplayRules(8)), source, source.cells(), None)
    assert [(row.branches, row.limited) for row in plan.rows] == [(4, 1.0), (8, 1.0), (16, 1.0), (32, None)]
    assert plan.recommended is not None
    assert plan.recommended.branches == 8
    show_plan(plan)
    printed = capsys.readouterr().out
    assert "100% of the episodes open all 8 branches that --max-branches allows" in printed
    assert "?" in printed


def test_a_plan_is_made_for_the_orders_of_the_judgement() -> None:
    rows = {
        orders: plan_row(replace(plan_of(TRUE, NOTHING), orders=orders), GateTerms(), BRANCHES, 0.0)
        for orders in (PlannedOrders(ORDERS, ORDERS), PlannedOrders(100, ORDERS))
    }
    few, many = rows.values()
    assert few.questions == questions_needed(2.0, TRUE.at(BRANCHES, ORDERS) ** 0.5, 0.03)
    assert many.questions == questions_needed(2.0, TRUE.at(BRANCHES, 100) ** 0.5, 0.03)


def test_the_plan_command_plans_for_the_default_orders_of_each_judgement_and_warns_of_no_missing_branch(
    tmp_path: Path,
) -> None:
    recordings = tmp_path / "recordings.jsonl"
    recordings.write_text("".join(format_recording_line(item) for item in recorded(6, Split.SEARCH)))
    options = f"--recordings {recordings} --champion self_consistency --plan --gain 9 --max-branches 16 --betas 0,0.5"
    done = CliRunner().invoke(
        app, ["gate", "short_m_at_k", *options.split(), "--engine", "local", "--report", f"{tmp_path}/plan.json"]
    )
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["measured_orders"], written["orders"]) == (20, {"single": 100, "sequential": 20})
    assert "planned for a judgement with 100 orders" in done.output
    assert "branches are recorded" not in done.output


def test_a_plan_warns_once_of_each_cell_that_labels_are_from_feedback(caplog: pytest.LogCaptureFixture) -> None:
    items = [*recorded(6, Split.SEARCH), *recorded(6, Split.VALIDATION)]
    source = Guarded(*(replace(item, label_source=LabelSource.FEEDBACK) for item in items))
    make_plan(compared(orders=2), source, source.cells(), None)
    assert [record.message for record in caplog.records if UNEVEN_FEEDBACK in record.message] == [
        f"{' '.join(cell)}: right answers are known by feedback: {UNEVEN_FEEDBACK}" for cell in source.cells()
    ]


def test_a_plan_warns_once_of_branches_that_are_missing(caplog: pytest.LogCaptureFixture) -> None:
    source = Guarded(*recorded(6, Split.SEARCH))
    for most, count in ((16, 0), (40, 1)):
        caplog.clear()
        make_plan(replace(compared(orders=2), rules=ReplayRules(most)), source, source.cells(), None)
        assert [record.message.count("only 16 branches are recorded") for record in caplog.records] == [1] * count


def test_the_plan_command_prints_a_table_and_writes_the_plan(tmp_path: Path) -> None:
    recordings = tmp_path / "recordings.jsonl"
    recordings.write_text("".join(format_recording_line(item) for item in recorded(12, Split.SEARCH)))
    options = f"--recordings {recordings} --champion self_consistency --plan --gain 5 --shuffles 2 --max-branches 16"
    more = f"--betas 0,0.5 --engine local --report {tmp_path}/plan.json"
    done = CliRunner().invoke(app, ["gate", "short_m_at_k", *options.split(), *more.split()])
    assert done.exit_code == 0, done.output
    assert "questions for 5" in done.output
    assert "measured on 12 questions" in done.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["gain"], len(written["rows"])) == (5, 4)
    done = CliRunner().invoke(app, ["gate", "short_m_at_k", "--recordings", str(recordings)])
    assert done.exit_code == 2
    assert "--ledger is needed" in done.output
