"""The gate: its statistics by simulation, each condition, planted finalists, the ledger and the command."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from controllers.loading import Spec
from discovery.commands.gate import _show
from discovery.data.importers import format_recording_line
from discovery.data.recordings import Cell, LabelSource, Origin, RecordedBranch, RecordedQuestion, Split, question_id
from discovery.errors import GateError, RecordingsNotFound
from discovery.evaluation.afs import Anchor, curves, mean_afs
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.paired_statistics import (
    bootstrap_bounds,
    detectable_difference,
    question_values,
    sequential_alpha,
    sign_flip_p,
)
from discovery.evaluation.replay_jobs import OUTCOME_COLUMNS, EpisodeFailure, ReplayRules, Sealing
from discovery.evaluation.score_set import (
    CellBaseline,
    ControllerScores,
    ScoreSet,
    cheapest_at_accuracy,
    score_controllers,
)
from discovery.evaluation.scores import Score
from discovery.promotion import comparison, gate
from discovery.promotion.comparison import Comparison
from discovery.promotion.conditions import GateTerms
from discovery.promotion.gate import GateJob, run_gate
from discovery.promotion.ledger import Ledger, fingerprint
from discovery.promotion.requirements import judged_models
from discovery.promotion.verdict import (
    GateReport,
    GateVerdict,
    JudgementContext,
    card_of,
    describe_savings,
    judge,
    report_of,
)
from discovery.store import StorePlace, child_environment
from proxy.cli import app
from tests.discovery.evaluation.test_evaluate import Given
from tests.discovery.promotion.outside import ledger_lines, write_ledger

NOISES = 200

# The statistical test


def enumerated_p(differences: Sequence[float]) -> float:
    """Return the sign-flip p-value by enumerating all flips."""
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [sum(sign * one for sign, one in zip(signs, differences, strict=True)) for signs in flips]
    return sum(one >= sum(differences) - 1e-12 for one in sums) / len(sums)


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1, 2, 3], 1 / 8), ([1, 1, 1, -1], 5 / 16), ([1], 1 / 2), ([-1], 1), ([0, 0], 1), ([0, 1, 0, 2], 1 / 4)],
)
def test_the_sign_flip_p_is_exact_on_few_questions(differences: list[float], p: float) -> None:
    assert sign_flip_p(np.array(differences, float)) == p == enumerated_p(differences)


def test_the_sign_flip_p_is_exact_with_ties_and_rounding() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        differences = rng.integers(-3, 5, 9) / 10  # many ties, and sums that depend on the order of addition
        assert sign_flip_p(differences) == pytest.approx(enumerated_p(list(differences)))


@pytest.mark.slow
def test_the_sampled_p_is_close_to_the_exact_one_and_never_zero() -> None:
    differences = np.random.default_rng(2).normal(0.4, 1, 16)
    assert sign_flip_p(differences) == pytest.approx(enumerated_p(list(differences)), abs=0.01)
    assert sign_flip_p(np.ones(60)) == 1 / 20_001
    assert sign_flip_p(np.ones(60), sequential_alpha(40, 0.05)) < sequential_alpha(
        40, 0.05
    )  # more draws where the level needs them


def test_the_levels_of_all_judgements_sum_to_alpha() -> None:
    levels = [sequential_alpha(k, 0.05) for k in range(1, 10_000)]
    assert 0.0499 < sum(levels) < 0.05
    assert levels == sorted(levels, reverse=True)


def noises(rng: np.random.Generator, finalists: int, questions: int = 12) -> NDArray[np.float64]:
    """Return differences of finalists that are no better than the champion, on shared questions of unequal weight."""
    hard = rng.gamma(0.7, 5, questions)
    shared = rng.choice([-1, 1], questions) * (
        rng.random(questions) < 0.3
    )  # the part shared by finalists of one search
    return hard * (shared + rng.normal(0, 1, (finalists, questions)))


def test_finalists_without_an_effect_pass_no_more_often_than_alpha() -> None:
    rng = np.random.default_rng(3)
    first = ever = 0
    for _ in range(NOISES):
        passed = [sign_flip_p(one) <= sequential_alpha(k, 0.05) for k, one in enumerate(noises(rng, 10), start=1)]
        first += passed[0]
        ever += any(passed)
    assert first <= 14  # 6 are expected; more than 14 come up once in a thousand
    assert ever <= 20  # 10 at most are expected; more than 20 come up once in a thousand


@pytest.mark.slow
def test_power_at_the_detectable_difference_is_about_80_percent() -> None:
    rng = np.random.default_rng(4)
    drawn = rng.normal(0, 1, (60, 60))
    alpha = sequential_alpha(1, 0.05)
    noticed = detectable_difference(drawn[0] / drawn[0].std(ddof=1), alpha)
    assert noticed is not None
    assert noticed == pytest.approx((1.913 + 0.848) / math.sqrt(60), abs=0.001)  # t of 59 degrees
    power = [
        np.mean([sign_flip_p(one + shift, alpha) <= alpha for one in drawn]) for shift in (0, noticed / 2, noticed)
    ]
    assert power[0] < 0.1 < power[1] < 0.6 < power[2]
    assert 0.65 < power[2] < 0.95


def test_with_too_few_questions_no_difference_is_detectable() -> None:
    assert detectable_difference(np.ones(1), 0.05) is None
    assert detectable_difference(np.array([1.0, 2, 3, 4]), 0.03) is None  # the smallest possible p is 1/16
    assert detectable_difference(np.array([1.0, 2, 3, 4, 5, 6]), 0.03) is not None


def test_bootstrap_bounds_match_the_normal_approximation() -> None:
    differences = np.random.default_rng(5).normal(1, 2, 100)
    half = 1.645 * differences.std() / 10
    assert bootstrap_bounds(differences) == pytest.approx(
        (differences.mean() - half, differences.mean() + half), abs=0.03
    )
    assert bootstrap_bounds(np.ones(5)) == (1, 1)
    assert bootstrap_bounds(np.ones(1)) == (-math.inf, math.inf)


def test_a_question_of_several_models_is_averaged_and_cells_have_equal_weight() -> None:
    first, second, third = (Cell(model, "b", Split.HELD_OUT) for model in "mno")
    values = {first: np.array([1.0, 3]), second: np.array([5.0, 3])}
    questions = {first: ["p", "q"], second: ["q", "p"], third: ["r"]}
    assert list(question_values(values, questions)) == [2, 4]
    pooled = question_values({**values, third: np.array([9.0])}, questions)
    assert len(pooled) == 3
    assert pooled.mean() == pytest.approx((2 + 4 + 9) / 3)


def test_the_cheapest_tokens_for_an_accuracy_are_interpolated() -> None:
    line = [(10.0, 50.0), (20.0, 60.0), (40.0, 55.0), (80.0, 65.0)]
    assert [cheapest_at_accuracy(line, accuracy) for accuracy in (40, 50, 55, 60, 61, 66)] == [10, 10, 15, 20, 64, None]


# Each condition, on constructed scores

BETAS = (0.0, 0.5, 1.0)
TOKENS = (1000, 4000, 16000)
SHUFFLES = 100
QUESTIONS = 12


def score(name: str, at: int, model: str, accuracy: NDArray[np.float64], path: int, failures: int) -> Score:
    """Return the score of one controller at one β: `accuracy` is the percentage right by question."""
    outcomes = np.zeros((len(OUTCOME_COLUMNS), SHUFFLES, len(accuracy)), np.int64)
    outcomes[OUTCOME_COLUMNS.index("right")] = np.arange(SHUFFLES)[:, None] < accuracy
    outcomes[OUTCOME_COLUMNS.index("tokens")] = TOKENS[at]
    outcomes[OUTCOME_COLUMNS.index("critical_path")] = path
    cell = Cell(model, "b", Split.HELD_OUT)
    failed = [EpisodeFailure(0, shuffle, "no idea") for shuffle in range(failures)]
    return Score(name, Spec(name).digest, BETAS[at], cell, outcomes, failed, 1.0)


def side(
    name: str, gains: Mapping[str, Any], path: int = 1000, failures: int = 0, questions: int = QUESTIONS
) -> ControllerScores:
    """Return scores whose accuracy is 50 plus the gain of each model; a gain may be a list by β."""
    scores = []
    for (model, gain), at in itertools.product(gains.items(), range(len(BETAS))):
        of_beta = np.broadcast_to(gain[at] if isinstance(gain, list) else gain, questions)
        scores.append(score(name, at, model, 50 + of_beta, path, failures))
    anchors = dict.fromkeys((one.cell for one in scores), Anchor(1000, 50, 1000))
    return ControllerScores(Spec(name), scores, {curve.cell: curve for curve in curves(scores, anchors)})


def measured(gains: Mapping[str, Any], questions: int = QUESTIONS, **changes: Any) -> ScoreSet:
    sides = [
        side("finalist", gains, questions=questions, **changes),
        side("champion", dict.fromkeys(gains, 0), questions=questions),
    ]
    ids = [question_id(str(number)) for number in range(questions)]
    ground = {
        cell: CellBaseline(ids, curve.anchor, np.full(questions, 0.5), np.full(questions, 1000.0), 100)
        for cell, curve in sides[0].curves.items()
    }
    return ScoreSet(ground, sides)


def judged(gains: Mapping[str, Any], k: int = 1, advice: Sequence[str] = (), **changes: Any) -> GateReport:
    return judge(measured(gains, **changes), GateTerms(), JudgementContext(k, advice, "split", "now", "me"))


def failed(report: GateReport) -> list[str]:
    return [one.name for one in report.failed]


SPREAD = np.array([4.0, 6] * 6)
WIDE = np.array([-10.0, 10] * 6)

CONDITIONS: dict[str, tuple[dict[str, Any], GateVerdict, list[str]]] = {
    "none": ({}, GateVerdict.PROMOTE, []),
    "static": ({"advice": ["line 1: print()"]}, GateVerdict.REJECT, ["static"]),
    "failures": ({"failures": 3}, GateVerdict.REJECT, ["failures"]),
    "not significant": ({"k": 20}, GateVerdict.UNDECIDED, ["significant"]),
    "unsure at β": ({"gains": {"m": [20, WIDE, 40]}}, GateVerdict.UNDECIDED, ["accuracy"]),
    "inferior at β": ({"gains": {"m": [20, -SPREAD, 40]}}, GateVerdict.REJECT, ["accuracy"]),
    "a losing cell": ({"gains": {"m": 20, "n": -3, "o": 20}}, GateVerdict.REJECT, ["cells"]),
    "path": ({"path": 1351}, GateVerdict.REJECT, ["path"]),
    "one model carries it": ({"gains": {"m": 20, "n": -1}}, GateVerdict.UNDECIDED, ["models"]),
    "worse": ({"gains": {"m": -SPREAD}}, GateVerdict.REJECT, ["better", "significant", "accuracy", "cells"]),
    "the same": ({"gains": {"m": 0}}, GateVerdict.REJECT, ["better", "significant"]),
}


@pytest.mark.parametrize("what", CONDITIONS)
def test_each_gate_condition_can_fail_and_decides_the_verdict(what: str) -> None:
    changes, verdict, names = CONDITIONS[what]
    report = judged(**{"gains": {"m": SPREAD, "n": SPREAD[::-1]}, **changes})
    assert (failed(report), report.verdict) == (names, verdict)


def test_a_gate_report_contains_its_effect_p_conditions_and_headlines() -> None:
    report = judged({"m": SPREAD, "n": 2 * SPREAD})
    given = measured({"m": SPREAD, "n": 2 * SPREAD})
    areas = [mean_afs(list(one.curves.values())) for one in given.sides]
    assert report.delta_afs == pytest.approx(areas[0] - areas[1])
    assert report.interval is not None
    assert report.interval[0] < report.delta_afs < report.interval[1]
    assert (report.p, report.alpha, report.k) == (2**-12, sequential_alpha(1, 0.05), 1)
    assert [one.name for one in report.conditions] == [
        *("held-out", "static", "failures", "better", "significant", "accuracy", "cells", "path", "models")
    ]
    assert sign_flip_p(np.array(report.as_json()["gains"]), report.alpha) == report.p
    assert report.cells[0].finalist[1] == pytest.approx({"beta": 0.5, "tokens": 4000, "accuracy": 55, "path": 1000})
    assert report.headlines.accuracy == pytest.approx(7.5)
    assert report.headlines.savings == pytest.approx(75)  # β = 0 is already as accurate
    assert report_of(json.loads(json.dumps(report.as_json()))) == report


def test_a_critical_path_at_its_bound_is_promoted() -> None:
    assert (
        judged({"m": SPREAD}, path=1350).verdict is GateVerdict.PROMOTE
    )  # the bound is 1.25 × 1,000 plus one interval of 100


def test_a_card_contains_lineage_run_verdict_and_curve() -> None:
    card = card_of(judged({"m": SPREAD}), ["parent", "grandparent"], run="r1")
    assert (card["lineage"], card["run"], card["gate"]["verdict"]) == (["parent", "grandparent"], "r1", "promote")
    assert card["curve"]["m b"][0]["tokens"] == 1000
    assert json.dumps(card)


@pytest.mark.parametrize("gain", [20, 0, -20])
def test_one_question_never_promotes(gain: float) -> None:
    report = judged({"m": gain}, questions=1)
    assert report.verdict is (GateVerdict.UNDECIDED if gain > 0 else GateVerdict.REJECT)
    assert (report.mde, report.interval, report.cells[0].low) == (None, None, None)
    assert "NaN" not in json.dumps(report.as_json())
    assert "Infinity" not in json.dumps(report.as_json())


def test_a_judgement_of_too_few_questions_says_how_many_are_needed() -> None:
    few, enough = (
        next(
            condition.words
            for condition in judged({"m": 20}, questions=count).conditions
            if condition.name == "significant"
        )
        for count in (3, 6)
    )
    assert "3 questions cannot give less than 0.125: at least 6 are needed" in few
    assert "needed" not in enough


@pytest.mark.parametrize(("percent", "text"), [(75, "75 % fewer tokens"), (-123.4, "123 % more tokens")])
def test_a_negative_saving_is_stated_as_a_cost(percent: float, text: str) -> None:
    assert describe_savings(percent) == f"{text} at the champion's accuracy"


def test_a_report_says_where_accuracy_is_compared_and_at_which_beta_the_finalist_costs_as_much() -> None:
    report = judged({"m": SPREAD, "n": SPREAD})
    accuracy = next(condition for condition in report.conditions if condition.name == "accuracy")
    assert "points at the finalist's tokens at β = 0.5, 90 %" in accuracy.words
    spent = {point["beta"]: point["tokens"] for point in report.cells[0].finalist}
    wanted = report.cells[0].champion[1]["tokens"]
    assert spent[0.5] == wanted
    assert report.headlines.same_cost_beta == 0.5


@pytest.mark.parametrize(("scale", "beta"), [(1, 0.5), (0.5, 2 / 3), (0.4, 0.75), (0.2, None), (5, None)])
def test_the_beta_of_the_champions_cost_is_read_between_the_finalists_points(scale: float, beta: float | None) -> None:
    given = measured({"m": SPREAD, "n": SPREAD})
    finalist, champion = given.sides
    curves = {
        cell: replace(curve, points=[point._replace(tokens=point.tokens * scale) for point in curve.points])
        for cell, curve in finalist.curves.items()
    }
    sides = [replace(finalist, curves=curves), champion]
    report = judge(replace(given, sides=sides), GateTerms(), JudgementContext(1, [], "s", "now", "me"))
    assert report.headlines.same_cost_beta == (None if beta is None else pytest.approx(beta))


def test_an_undecided_verdict_says_how_many_more_questions_it_takes() -> None:
    noisy = np.array([-20.0, 30] * 6)  # a mean of 5 with a spread of 26
    report = judged({"m": noisy})
    assert report.verdict is GateVerdict.UNDECIDED
    assert report.more is not None
    more = judged(
        {"m": np.tile(noisy, (12 + report.more) // 12 + 1)}, k=2, questions=12 * ((12 + report.more) // 12 + 1)
    )
    assert more.verdict is GateVerdict.PROMOTE
    assert judged({"m": WIDE}).more is None  # no gain, and so rejected
    assert judged({"m": SPREAD}).more is None  # promoted


def test_an_undecided_verdict_on_a_significant_gain_blames_no_small_gain(capsys: pytest.CaptureFixture[str]) -> None:
    report = judged({"m": 20, "n": -1})
    assert ([one.name for one in report.failed], report.more) == (["models"], None)
    _show(report)
    output = capsys.readouterr().out
    assert "more questions are unlikely to decide: see the conditions that are not met" in output
    assert "too small" not in output


def test_a_gain_without_variance_is_promoted() -> None:
    report = judged({"m": 20})
    assert (report.verdict, report.mde) == (GateVerdict.PROMOTE, 0)


# Planted finalists, on recordings

FIRST = """
from controllers import advance, answer, branch


class First:
    '''As many chains as self-consistency has, and the first that finishes is believed.'''

    def __init__(self, beta):
        self.chains = round(2 ** (6 * beta))

    def decide(self, state):
        if state.finished:
            return [answer(state.branches[state.finished[0]].label)]
        missing = min(self.chains - state.width, state.room)
        return [advance(i) for i in state.active] + [branch()] * missing
"""
LAST = """
from controllers import TO_END, advance, answer, branch


class Last:
    '''As self-consistency, but of equal votes the one seen last leads: noise.'''

    def __init__(self, beta):
        self.chains = round(2 ** (6 * beta))

    def decide(self, state):
        missing = min(self.chains - state.width, state.room)
        if state.active or missing:
            return [advance(i, TO_END) for i in state.active] + [branch(TO_END)] * missing
        votes = sorted(state.votes.items(), key=lambda one: (one[1], one[0]))
        return [answer(votes[-1][0] if votes else None)]
"""
SHORTER, LONGER = 0.95, 0.05


def question(number: int, model: str, split: Split, shorter: float, longer: float) -> RecordedQuestion:
    """Return sixteen chains; short ones are right with probability `shorter`, long ones with `longer`."""
    rng = np.random.default_rng([number, *model.encode(), *split.encode()])
    chains = []
    for _ in range(16):
        length = int(rng.integers(60, 900))
        final = "7" if rng.random() < (shorter if length < 480 else longer) else "8"
        chains.append(RecordedBranch([final] * (length // 100), length, final, []))
    text = f"{split} {number}"
    return RecordedQuestion(question_id(text), model, "b", 100, chains, "7", split=split)


def recorded(split: Split, shorter: float, longer: float, questions: int = 20) -> list[RecordedQuestion]:
    return [question(number, model, split, shorter, longer) for model in "mn" for number in range(questions)]


GOOD = Given(*recorded(Split.HELD_OUT, SHORTER, LONGER))
OVERFITTED = Given(*recorded(Split.SEARCH, SHORTER, LONGER), *recorded(Split.HELD_OUT, LONGER, SHORTER))


def run(
    source: Given,
    finalist: Spec,
    ledger: StorePlace,
    split: Split = Split.HELD_OUT,
    champion: Spec = Spec("self_consistency"),  # noqa: B008
    **changes: Any,
) -> GateReport:
    about: dict[str, Any] = {
        "rules": ReplayRules(16),
        "betas": BETAS,
        "shuffles": 4,
        "now": "now",
        "who": "me",
    } | changes
    cells = [cell for cell in source.cells() if cell.split is split]
    return run_gate(source, cells, Comparison(finalist, champion, make_engine(EngineName.LOCAL), **about), ledger)


@pytest.mark.process
def test_a_better_finalist_is_promoted(tmp_path: Path) -> None:
    report = run(GOOD, Spec("first", FIRST), tmp_path / "ledger")
    assert failed(report) == []
    assert report.verdict is GateVerdict.PROMOTE
    assert report.delta_afs > 5
    assert (report.questions, len(report.cells)) == (20, 2)


@pytest.mark.process
def test_a_finalist_better_only_on_the_search_split_is_rejected(tmp_path: Path) -> None:
    finalist = Spec("first", FIRST)
    assert failed(run(OVERFITTED, finalist, tmp_path / "search", Split.SEARCH)) == ["held-out"]
    report = run(OVERFITTED, finalist, tmp_path / "ledger")
    assert report.verdict is GateVerdict.REJECT
    assert {"better", "significant", "accuracy", "cells"} <= set(failed(report))


@pytest.mark.process
def test_a_finalist_without_an_effect_is_not_promoted_and_the_detectable_effect_is_reported(tmp_path: Path) -> None:
    report = run(GOOD, Spec("last", LAST), tmp_path / "ledger")
    assert report.verdict is not GateVerdict.PROMOTE
    assert "significant" in failed(report)
    assert report.mde is not None
    assert 0 < report.mde < 10


@pytest.mark.process
def test_a_finalist_that_fails_or_violates_the_static_check_is_rejected(tmp_path: Path) -> None:
    body = FIRST + "        print()\n"
    report = run(GOOD, Spec("first", body), tmp_path / "ledger", shuffles=1)
    assert "static" in failed(report)
    body = FIRST.replace(
        "if state.finished:", "if state.width > 9: raise ValueError('wide')\n        if state.finished:"
    )
    report = run(GOOD, Spec("first", body), tmp_path / "ledger", shuffles=1)
    assert "failures" in failed(report)
    assert "First raised ValueError: wide" in next(one.words for one in report.failed if one.name == "failures")
    assert (report.verdict, report.k) == (GateVerdict.REJECT, 2)


@pytest.mark.process
@pytest.mark.parametrize(
    ("finalist", "changes", "message"),
    [
        (Spec("self_consistency"), {}, "self_consistency is identical to the champion"),
        (Spec("first", FIRST), {"rules": ReplayRules(16, sealing=Sealing.NONE)}, "can only be judged in the sandbox"),
        (Spec("single"), {"betas": [0.0, 1.0]}, "the deployed β 0.5 is not among the scored values 0.0, 1.0"),
        (Spec("single"), {"terms": GateTerms(alpha=0)}, "α is 0; it must be above 0 and below 1"),
        (Spec("single"), {"champion": Spec("no", FIRST + "    raise ValueError\n")}, "champion no failed"),
    ],
)
def test_a_comparison_that_cannot_be_judged_spends_no_judgement(
    tmp_path: Path, finalist: Spec, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(GateError, match=message):
        run(GOOD, finalist, tmp_path / "ledger", shuffles=1, **changes)
    assert Ledger(tmp_path / "ledger").judgements() == []


def test_questions_with_consensus_labels_are_not_judged(tmp_path: Path) -> None:
    voted = [replace(one, label_source=LabelSource.CONSENSUS) for one in recorded(Split.HELD_OUT, LONGER, SHORTER, 40)]
    both = Given(*GOOD.recordings, *voted[20:40], *voted[60:])
    alone = run(GOOD, Spec("single"), tmp_path / "alone", shuffles=1)
    report = run(both, Spec("single"), tmp_path / "both", shuffles=1)
    assert (report.questions, report.delta_afs, report.p) == (20, alone.delta_afs, alone.p)
    with pytest.raises(RecordingsNotFound, match="the only reference answers are 40 by consensus"):
        run(Given(*voted), Spec("single"), tmp_path / "ledger")
    assert Ledger(tmp_path / "ledger").judgements() == []


def test_collected_recordings_are_judged_by_canonical_answers(tmp_path: Path) -> None:
    spelled = [
        replace(
            recording, branches=[b._replace(final=f" {b.final}.0") for b in recording.branches], origin=Origin.COLLECTED
        )
        for recording in GOOD.recordings
    ]
    report, plain = (
        run(source, Spec("single"), tmp_path / name, shuffles=1)
        for name, source in (("spelled", Given(*spelled)), ("plain", GOOD))
    )
    assert (report.answers, plain.answers) == ("canonical", "exact")
    assert (report.delta_afs, report.p) == (plain.delta_afs, plain.p)


# The ledger

FEW = Given(*recorded(Split.HELD_OUT, SHORTER, LONGER, questions=3))


def quickly(name: str, ledger: StorePlace, source: Given = FEW, **changes: Any) -> GateReport:
    return run(source, Spec(name), ledger, shuffles=1, **changes)


def test_every_finalist_takes_the_next_level_and_is_judged_only_once(
    ledger_place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ledger_place
    reports = [quickly(name, path) for name in ("single", "asc@4", "esc@8")]
    assert [one.k for one in reports] == [1, 2, 3]
    assert [one.alpha for one in reports] == [sequential_alpha(k, 0.05) for k in (1, 2, 3)]
    assert quickly("single", path, champion=Spec("asc@8")).k == 4  # another champion is another comparison
    monkeypatch.setattr(comparison, "score_controllers", None)  # nothing is scored again
    assert quickly("asc@4", path) == reports[1]
    lines = Ledger(path).judgements()
    assert [(one.k, one.verdict, one.p) for one in lines[:3]] == [(one.k, one.verdict, one.p) for one in reports]
    assert lines[0].split == fingerprint((one.question for one in FEW.recordings), ["m", "n"])
    assert [one.who for one in lines] == ["me"] * 4


def test_adding_questions_to_a_split_does_not_reset_its_judgements(ledger_place: StorePlace) -> None:
    path = ledger_place
    grown = Given(*recorded(Split.HELD_OUT, SHORTER, LONGER, questions=4))
    other = Given(*recorded(Split.VALIDATION, SHORTER, LONGER, questions=3))
    assert quickly("single", path).k == 1
    assert quickly("single", path, grown).k == 2
    assert quickly("single", path, other, split=Split.VALIDATION).k == 1


def order(folder: Path, finalist: str = "asc@4", ledger: StorePlace | None = None) -> GateJob:
    recordings = folder / "recordings.jsonl"
    recordings.write_text("".join(format_recording_line(one) for one in FEW.recordings))
    return GateJob(
        finalist,
        "self_consistency",
        recordings,
        ledger or folder / "ledger",
        folder / "report",
        "now",
        "me",
        betas="0,0.5",
        shuffles=1,
        max_branches=16,
        engine=EngineName.LOCAL,
    )


@pytest.mark.process
def test_a_gate_killed_before_its_report_has_spent_its_judgement(tmp_path: Path, ledger_place: StorePlace) -> None:
    given = order(tmp_path, ledger=ledger_place)
    dying = (
        "import os, sys; from discovery.promotion import gate; from discovery.promotion.verdict import GateReport\n"
        "GateReport.write = lambda *_: os._exit(9)\n"
        "gate.main(sys.argv[1:])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", dying, *given.options], check=False, env=child_environment(ledger_place)
    )
    assert killed.returncode == 9
    assert not given.report.exists()
    (line,) = Ledger(given.ledger).judgements()
    report = given.run()
    assert (report.k, report.verdict, report.p) == (line.k, line.verdict, line.p)
    assert json.loads(given.report.read_text()) == report.as_json() == line.report
    assert len(Ledger(given.ledger).judgements()) == 1
    assert replace(given, finalist="single").run().k == 2


def test_a_gate_for_one_model_judges_that_models_questions_and_says_so(tmp_path: Path) -> None:
    given = order(tmp_path)
    report = replace(given, model="n").run()
    assert ({cell.model for cell in report.cells}, report.model) == ({"n"}, "n")
    assert " on model n" in report.headline
    assert json.loads(given.report.read_text())["model"] == "n"
    assert replace(given, model="m").run().k == 2  # on the same questions
    every = given.run()
    assert ({cell.model for cell in every.cells}, every.model, every.k) == ({"m", "n"}, "", 3)
    assert [line.model for line in Ledger(given.ledger).judgements()] == ["n", "m", ""]
    with pytest.raises(RecordingsNotFound, match="no recordings of model 'third'"):
        replace(given, model="third").run()


def test_a_report_says_which_recorded_models_and_benchmarks_its_selection_leaves_out(tmp_path: Path) -> None:
    given = order(tmp_path)
    extra = [replace(one, benchmark="c") for one in recorded(Split.VALIDATION, SHORTER, LONGER, questions=3)]
    extra += [replace(one, benchmark="d", split=Split.HELD_OUT) for one in extra if one.model == "m"]
    with (tmp_path / "recordings.jsonl").open("a") as file:
        file.writelines(map(format_recording_line, extra))
    chosen = {"all": given, "models": replace(given, models="n"), "benchmarks": replace(given, benchmarks="b")}
    reports = {name: job.run() for name, job in chosen.items()}
    left_out = {name: (report.models_left_out, report.benchmarks_left_out) for name, report in reports.items()}
    assert left_out == {"all": ([], []), "models": (["m"], []), "benchmarks": ([], ["d"])}
    judged = {name: judged_models(report.as_json()) for name, report in reports.items()}
    assert judged == {"all": [], "models": ["n"], "benchmarks": ["m", "n"]}
    lines = [line.report["models_left_out"] for line in Ledger(given.ledger).judgements()]
    assert lines == [report.models_left_out for report in reports.values()]


def test_a_verdict_of_the_ledger_is_about_the_model_that_is_asked_for(tmp_path: Path) -> None:
    given = order(tmp_path)
    asked = [replace(given, models="n"), replace(given, model="n"), replace(given, models="n")]
    reports = [job.run() for job in asked]
    assert [(report.model, report.models_left_out) for report in reports] == [("", ["m"]), ("n", ["m"]), ("", ["m"])]
    assert [judged_models(report.as_json()) for report in reports] == [["n"]] * 3
    only = "".join(format_recording_line(one) for one in FEW.recordings if one.model == "n")
    (tmp_path / "recordings.jsonl").write_text(only)
    every = given.run()  # the only recorded model is every model
    assert (every.model, every.models_left_out, every.delta_afs) == ("", [], reports[0].delta_afs)
    assert len(Ledger(given.ledger).judgements()) == 1


def test_an_earlier_report_without_a_selection_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    report = judged({"m": SPREAD})
    earlier = {name: value for name, value in report.as_json().items() if not name.endswith("_left_out")}
    assert report_of(earlier) == report
    assert judged_models(earlier) == []
    _show(replace(report, models_left_out=["n"]))
    assert "judged on a selection (models_left_out: n): it can be promoted with --model only" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["changed", "dropped", "nonsense", "binary"])
def test_a_corrupt_ledger_is_refused_by_name_and_left_unchanged(ledger_place: StorePlace, harm: str) -> None:
    for name in ("single", "asc@4", "esc@8"):
        quickly(name, ledger_place)
    lines = ledger_lines(ledger_place)
    harmed = {
        "changed": [lines[0].replace(b'"k":1', b'"k":9'), *lines[1:]],
        "dropped": lines[1:],
        "nonsense": [*lines, b"{}"],
        "binary": [b"\xff\xfe"],
    }
    write_ledger(ledger_place, harmed[harm])
    with pytest.raises(GateError, match=rf"{re.escape(str(ledger_place))}.*: line .*; restore the ledger from a copy"):
        quickly("single", ledger_place)
    assert ledger_lines(ledger_place) == harmed[harm]


def test_a_torn_ledger_file_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    quickly("single", path)
    path.write_bytes(path.read_bytes()[:-9])
    torn = path.read_bytes()
    with pytest.raises(GateError, match=f"{path}: the last line is incomplete"):
        quickly("single", path)
    assert path.read_bytes() == torn


# The command


@pytest.mark.process
def test_the_gate_command_judges_in_another_process(tmp_path: Path) -> None:
    given = order(tmp_path)
    file = tmp_path / "first.py"
    file.write_text(FIRST)
    options = ["--recordings", given.recordings, "--champion", "self_consistency", "--ledger", given.ledger]
    more = [
        "--report",
        given.report,
        "--betas",
        "0,0.5",
        "--shuffles",
        "1",
        "--max-branches",
        "16",
        "--engine",
        "local",
    ]
    done = CliRunner().invoke(app, ["gate", str(file), *map(str, options), *map(str, more)])
    assert done.exit_code == 0, done.output
    assert "significant" in done.output
    assert "first: undecided" in done.output
    assert "answer comparison: exact\n" in done.output
    assert "reliably detect" in done.output
    assert json.loads(given.report.read_text())["name"] == "first"
    model = FEW.recordings[0].model
    done = CliRunner().invoke(app, ["gate", "single", "--model", model, *map(str, options), *map(str, more)])
    assert f" for model {model}\n" in done.output
    assert json.loads(given.report.read_text())["model"] == model
    done = CliRunner().invoke(app, ["gate", "nobody", *map(str, options), *map(str, more)])
    assert done.exit_code == 2
    done = CliRunner().invoke(app, ["gate", "single", "--model", "a", "--models", "b", *map(str, options)])
    assert (done.exit_code, "--model or --models, not both" in done.output) == (2, True)


def test_the_gate_command_prints_markup_in_messages_literally(capsys: pytest.CaptureFixture[str]) -> None:
    for report in (judged({"m": SPREAD}, failures=1), judged({"m": 20}, questions=1), judged({"m": -SPREAD})):
        marked = replace(report.conditions[1], words="[/red] [link")
        _show(replace(report, name="[/x]", conditions=[marked]))
        output = capsys.readouterr().out
        assert "[/red] [link" in output
        assert f"[/x]: {report.verdict}" in output


def test_a_gate_job_can_run_in_the_same_process(tmp_path: Path) -> None:
    given = order(tmp_path)
    assert gate.main(given.options) == 0
    assert json.loads(given.report.read_text())["verdict"] in list(GateVerdict)


def test_the_slower_of_two_concurrent_judgements_returns_the_report_of_the_faster(
    ledger_place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ledger_place
    reports: list[GateReport] = []

    def meanwhile(*arguments: Any) -> ScoreSet:
        monkeypatch.setattr(comparison, "score_controllers", score_controllers)
        reports.append(quickly("single", path))
        return score_controllers(*arguments)

    monkeypatch.setattr(comparison, "score_controllers", meanwhile)
    assert quickly("single", path) == reports[0]
    assert len(Ledger(path).judgements()) == 1


@pytest.mark.parametrize(("change", "message"), [({"finalist": "nobody"}, "nobody"), ({"shuffles": "x"}, "--shuffles")])
def test_an_invalid_gate_job_is_reported_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.main(replace(order(tmp_path), **change).options) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1
