"""Calibration: cost and accuracy of each β, the recommended map, and the β for a token budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from controllers.loading import Spec
from controllers.voting import confidence
from discovery.data.importers import format_recording_line
from discovery.data.recordings import LabelSource, Origin, RecordedBranch, RecordedQuestion, Split, question_id
from discovery.errors import DiscoveryError
from discovery.evaluation.calibration import (
    Arm,
    BetaMap,
    Calibration,
    CalibrationPoint,
    Calibrations,
    SingleChain,
    calibrate_scores,
    is_worth_its_tokens,
    read_calibrations,
    recommend_map,
    reliability,
    score_with_rival,
    write_calibrations,
)
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.paired_statistics import wilson_interval
from discovery.evaluation.replay_jobs import ReplayRules
from proxy.cli import app
from tests.discovery.evaluation.test_evaluate import Given, scores
from tests.discovery.evaluation.test_evaluate import question as varied

VARIED = Given(*(varied(i) for i in range(6)), *(varied(i, benchmark="c") for i in range(6, 10)))


def calibrated(source: Given, *names: str, **changes: Any) -> Calibrations:
    about: dict[str, Any] = {"betas": [1.0, 0.0, 0.5], "shuffles": 5} | changes
    specs = [Spec(name) for name in names or ("cmc",)]
    engine, rules = make_engine(EngineName.LOCAL), ReplayRules(16)
    return calibrate_scores(score_with_rival(source, source.cells(), specs, engine, rules, **about), specs)


def question(number: int, right: float, branches: int = 16) -> RecordedQuestion:
    """Return chains of one length that end in 7 with probability `right`, otherwise in 8; probes agree."""
    rng = np.random.default_rng(number)
    finals = ["7" if rng.random() < right else "8" for _ in range(branches)]
    chains = [RecordedBranch([final] * 9, 950, final, []) for final in finals]
    return RecordedQuestion(question_id(str(number)), "m", "b", 100, chains, "7")


def test_calibration_points_equal_the_figures_of_the_evaluator() -> None:
    calibration = calibrated(VARIED)["m"]
    assert (calibration.controller, calibration.digest) == ("cmc", Spec("cmc").digest)
    assert [point.beta for point in calibration.points] == [0, 0.5, 1]
    for point in calibration.points:
        cells = scores("cmc", source=VARIED, betas=[point.beta], shuffles=5)
        for column, scale, at, low, high in (
            ("tokens", 1, point.tokens, point.tokens_low, point.tokens_high),
            ("right", 100, point.accuracy, point.low, point.high),
        ):
            values = scale * np.concatenate([one.per_question(column) for one in cells])
            half = 1.96 * values.std() / np.sqrt(10)
            assert at == pytest.approx(values.mean())
            assert low == pytest.approx(at - half, abs=half / 2)
            assert high == pytest.approx(at + half, abs=half / 2)
        assert point.gain == pytest.approx(point.accuracy - calibration.single.accuracy)


def test_the_single_chain_baseline_is_the_mean_of_all_chains() -> None:
    chains = [(b.tokens, b.final == "7") for one in VARIED.recordings for b in one.branches]
    single = calibrated(VARIED)["m"].single
    assert (single.tokens, single.accuracy) == pytest.approx(tuple(np.mean(chains, axis=0) * (1, 100)))


def test_each_model_is_calibrated_separately() -> None:
    others = [RecordedQuestion(**{**vars(one), "model": "n"}) for one in VARIED.recordings[:3]]
    by_model = calibrated(Given(*VARIED.recordings, *others))
    assert list(by_model) == ["m", "n"]
    assert by_model["m"] == calibrated(VARIED)["m"]


def test_voting_on_mostly_correct_chains_is_worth_its_tokens() -> None:
    calibration = calibrated(Given(*(question(i, 0.7) for i in range(12))), "self_consistency")["m"]
    assert calibration.pays
    assert calibration.map == BetaMap(Arm.CONTROLLER, 1)
    assert calibration.points[-1].gains


@pytest.mark.parametrize("name", ["cmc", "self_consistency"])
def test_with_identical_chains_the_recommended_map_is_one_chain(name: str) -> None:
    calibration = calibrated(Given(*(question(i, i % 2) for i in range(12))), name)["m"]
    assert not calibration.pays
    assert calibration.map == BetaMap(Arm.SINGLE, 0)
    assert calibration.single.accuracy == 50


def test_one_question_gives_no_interval_and_never_pays() -> None:
    calibration = calibrated(Given(question(1, 0.7)))["m"]
    assert (calibration.pays, calibration.points[0].low, calibration.points[0].gain_half) == (False, None, None)
    assert "NaN" not in json.dumps(calibration.as_json())


def point(beta: float, tokens: float, accuracy: float, half: float = 2.0) -> CalibrationPoint:
    return CalibrationPoint(beta, tokens, None, None, accuracy, None, None, accuracy - 50, half)


def test_a_point_is_worth_its_tokens_only_above_the_rivals_curve() -> None:
    rival = [(1000.0, 50.0), (8000.0, 60.0), (64000.0, 66.0)]
    assert is_worth_its_tokens(point(0, 3000, 55), rival)
    assert not is_worth_its_tokens(point(0, 5000, 55), rival)  # 4,500 tokens of the rival reach the same accuracy
    assert is_worth_its_tokens(point(1, 10**6, 67), rival)  # the rival never reaches it
    assert not is_worth_its_tokens(point(0, 100, 51.9), rival)  # within the error of chance
    assert is_worth_its_tokens(point(0, 10**6, 53), [])


def test_the_recommended_map_caps_beta_or_uses_one_chain_when_beta_does_not_pay() -> None:
    rival = [(1000.0, 50.0), (8000.0, 60.0)]
    points = [point(0, 3000, 55), point(0.5, 5000, 57), point(1, 9000, 58)]
    assert recommend_map(points, rival, False) == BetaMap(Arm.CONTROLLER, 0.5)
    assert recommend_map(points[2:], rival, False) == BetaMap(Arm.SINGLE, 1)
    assert recommend_map(points, rival, True) == BetaMap(Arm.CONTROLLER, 1)


def dial(*tokens: float) -> Calibration:
    betas = np.linspace(0, 1, len(tokens))
    points = tuple(point(float(beta), spent, 60) for beta, spent in zip(betas, tokens, strict=True))
    return Calibration("cmc", Spec("cmc").digest, points, SingleChain(100, 50), True, BetaMap(Arm.CONTROLLER, 1))


def test_a_token_budget_is_mapped_to_the_beta_that_costs_it() -> None:
    linear_dial = dial(1000, 3000, 5000)
    assert [linear_dial.beta_for(tokens) for tokens in (1, 1000, 2000, 3000, 4500, 5000, 10**9)] == [
        *(0, 0, 0.25, 0.5, 0.875, 1, 1)
    ]
    betas = [dial(1000, 4000, 3500, 4000, 8000).beta_for(tokens) for tokens in range(0, 9000, 250)]
    assert betas == sorted(betas)
    assert dial(1000, 4000, 3500, 4000, 8000).beta_for(4000) == 0.25
    assert dial(1000).beta_for(5000) == 0


def test_a_calibration_file_is_read_back_unchanged(tmp_path: Path) -> None:
    by_model = calibrated(VARIED)
    write_calibrations(by_model, tmp_path / "c.json")
    assert read_calibrations(tmp_path / "c.json") == by_model
    body = json.loads((tmp_path / "c.json").read_text())["m"]
    assert list(body) == ["controller", "digest", "points", "single", "pays", "map", "answers", "reliability"]
    assert {"beta", "tokens", "tokens_low", "tokens_high", "accuracy", "low", "high"} <= set(body["points"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": []}, "m.points: "),
        ({"pays": "perhaps"}, "m.pays: "),
        ({"single": {"tokens": -1, "accuracy": 3}}, "m.single.tokens: "),
        ({"map": {"arm": "leg", "cap": 1}}, "m.map.arm: "),
    ],
)
def test_an_invalid_calibration_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"m": {**dial(1, 2).as_json(), **change}}))
    with pytest.raises(DiscoveryError, match=f"{path}: not a calibration: {message}"):
        read_calibrations(path)
    with pytest.raises(DiscoveryError, match="No such file"):
        read_calibrations(tmp_path / "d.json")


def test_calibrating_several_controllers_equals_calibrating_each_alone(tmp_path: Path) -> None:
    by_model = calibrated(VARIED, "asc", "self_consistency", "cmc")
    write_calibrations(by_model, tmp_path / "c.json")
    first = read_calibrations(tmp_path / "c.json")["m"]
    assert first == by_model["m"]
    for name in ("asc", "self_consistency", "cmc"):
        (alone,) = calibrated(VARIED, name).values()
        together = first.of_name(name)
        assert together is not None
        assert replace(together, others=()) == alone == replace(alone, others=())
        assert first.of_digest(Spec(name).digest) is together
    assert [one.controller for one in first.all] == ["asc", "self_consistency", "cmc"]
    assert first.of_name("esc") is None


def test_the_calibrate_command_shows_a_table_for_each_controller(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("".join(format_recording_line(varied(i)) for i in range(4)))
    status, output = verb(tmp_path, "--controllers", "cmc,asc")
    assert status == 0, output
    assert [name for name in ("cmc", "asc") if f"{name}: accuracy % and tokens" in output] == ["cmc", "asc"]
    assert [one.controller for one in read_calibrations(tmp_path / "c.json")["m"].all] == ["cmc", "asc"]


@pytest.mark.parametrize(
    ("pays", "best", "advice"),
    [
        (True, BetaMap(Arm.CONTROLLER, 1), "yes: all of β"),
        (False, BetaMap(Arm.CONTROLLER, 0.75), "yes: β up to 0.75"),
        (False, BetaMap(Arm.SINGLE, 0), "no: one chain serves best"),
    ],
)
def test_the_advice_states_how_far_beta_pays(pays: bool, best: BetaMap, advice: str) -> None:
    assert replace(dial(1, 2), pays=pays, map=best).advice == advice


def verb(folder: Path, *more: str) -> tuple[int, str]:
    options = ["--recordings", str(folder / "r.jsonl"), "--out", str(folder / "c.json"), "--max-branches", "16"]
    done = CliRunner().invoke(app, ["calibrate", *options, "--shuffles", "2", "--engine", "local", *more])
    return done.exit_code, done.output


def test_the_calibrate_command_ignores_held_out_questions_by_default(tmp_path: Path) -> None:
    lines = [format_recording_line(varied(i)) for i in range(4)]
    held = [format_recording_line(varied(i, split=Split.HELD_OUT, benchmark="h")) for i in range(4, 8)]
    (tmp_path / "r.jsonl").write_text("".join(lines + held))
    status, output = verb(tmp_path, "--controllers", "cmc")
    assert status == 0, output
    assert "cmc: accuracy % and tokens" in output
    assert "mean chain" in output
    assert "controllers are played in 2 orders of them" in output
    assert "share of right answers by agreement and confidence" in output
    assert "agreement: expected calibration error" in output
    assert "confidence: expected calibration error" in output
    assert read_calibrations(tmp_path / "c.json") == calibrated(
        Given(*(varied(i) for i in range(4))), betas=[0, 0.25, 0.5, 0.75, 1], shuffles=2
    )
    (tmp_path / "r.jsonl").write_text("".join(held))
    assert verb(tmp_path)[0] == 2
    assert verb(tmp_path, "--split", "held-out")[0] == 0


@pytest.mark.parametrize(("origin", "how"), [(Origin.IMPORTED, "exact"), (Origin.COLLECTED, "canonical")])
def test_the_calibrate_command_reports_how_answers_are_compared(tmp_path: Path, origin: Origin, how: str) -> None:
    (tmp_path / "r.jsonl").write_text("".join(format_recording_line(varied(i, origin=origin)) for i in range(4)))
    status, output = verb(tmp_path)
    assert (status, f"answer comparison: {how}\n" in output) == (0, True)
    assert read_calibrations(tmp_path / "c.json")["m"].answers == how


@pytest.mark.parametrize("more", [["--controllers", ""], ["--betas", ","]])
def test_the_calibrate_command_refuses_empty_controllers_or_betas(tmp_path: Path, more: list[str]) -> None:
    (tmp_path / "r.jsonl").write_text(format_recording_line(varied(1)))
    assert verb(tmp_path, *more)[0] == 2


# Reliability of agreement and confidence


def voted(number: int, finals: str, benchmark: str = "b") -> RecordedQuestion:
    """Return a question with reference 7 and one chain per character of `finals`."""
    branches = [RecordedBranch([final], 150, final, []) for final in finals]
    return RecordedQuestion(question_id(str(number)), "m", benchmark, 100, branches, "7")


KNOWN = Given(
    *(voted(i, finals) for i, finals in enumerate(["7778", "7877", "7779", "8777", "8887", "7888"])),
    *(voted(i, finals, "c") for i, finals in enumerate(["7777", "7777", "7777", "8888"], 6)),
)
"""Four votes each: four of six questions on which three agree are right, and three of four that are unanimous."""


def test_reliability_compares_the_mean_prediction_of_each_bin_with_its_share_of_right_answers() -> None:
    predicted = np.array([0.6] * 6 + [0.65] * 4 + [1.0] * 10)
    right = np.array([1] * 6 + [0] * 4 + [1] * 8 + [0] * 2)
    known = reliability(predicted, right, np.arange(20))
    first, second = known.bins
    assert (first.start, first.end, first.episodes, first.questions) == (60, 70, 10, 10)
    assert (first.predicted, first.accuracy) == pytest.approx((62, 60))
    assert (first.low, first.high) == pytest.approx(wilson_interval(0.6, 10))
    assert (second.start, second.end, second.predicted, second.accuracy) == (90, 100, 100, 80)
    assert known.error == pytest.approx(0.5 * 2 + 0.5 * 20)


def test_episodes_of_one_question_do_not_narrow_the_interval() -> None:
    predicted, right = np.full(40, 0.5), np.array([1, 0] * 20)
    apart = reliability(predicted, right, np.arange(40)).bins[0]
    paired = reliability(predicted, right, np.arange(40) // 4).bins[0]
    assert (apart.low, apart.high) == wilson_interval(0.5, 40)
    assert (paired.low, paired.high, paired.episodes, paired.questions) == (*wilson_interval(0.5, 10), 40, 10)
    uneven = reliability(predicted, right, np.array([0] * 30 + [1] * 10)).bins[0]
    assert (uneven.low, uneven.high) == wilson_interval(0.5, 40**2 / (30**2 + 10**2))


def test_predictions_on_the_edge_of_a_bin_belong_to_the_upper_one() -> None:
    bins = reliability(np.arange(11) / 10, np.ones(11, int), np.arange(11)).bins
    assert [(one.start, one.episodes) for one in bins] == [*((10 * i, 1) for i in range(9)), (90, 2)]


def test_the_reliability_of_votes_is_that_of_the_recorded_answers() -> None:
    votes = calibrated(KNOWN, "self_consistency@4", betas=[0.5, 1.0])["m"].reliability
    assert votes is not None
    assert (votes.episodes, votes.single_votes) == (10 * 5 * 2, 0)
    split, unanimous = votes.agreement.bins
    assert (split.predicted, split.accuracy, split.episodes) == pytest.approx((75, 100 * 4 / 6, 60))
    assert (unanimous.predicted, unanimous.accuracy, unanimous.episodes) == pytest.approx((100, 75, 40))
    assert (split.low, split.high) == pytest.approx(wilson_interval(4 / 6, 6))
    assert votes.agreement.error == pytest.approx(0.6 * (75 - 400 / 6) + 0.4 * 25)
    assert [one.predicted for one in votes.confidence.bins] == pytest.approx(
        [100 * confidence(3, 1), 100 * confidence(4, 0)]
    )
    assert [one.accuracy for one in votes.confidence.bins] == pytest.approx([400 / 6, 75])


def test_single_votes_are_counted_and_left_out() -> None:
    assert calibrated(KNOWN, "self_consistency", betas=[0.0])["m"].reliability is None
    both = calibrated(KNOWN, "self_consistency", betas=[0.0, 1.0])["m"].reliability
    assert both is not None
    assert (both.episodes, both.single_votes) == (50, 50)


@pytest.mark.parametrize("source", [LabelSource.REFERENCE, LabelSource.FEEDBACK])
def test_reliability_uses_the_labels_that_count_as_references(source: LabelSource) -> None:
    labelled = [replace(one, label_source=source) for one in KNOWN.recordings]
    guessed = [replace(one, question=f"{i:064x}", label_source=LabelSource.CONSENSUS) for i, one in enumerate(labelled)]
    known = calibrated(KNOWN, "self_consistency@4")["m"].reliability
    assert calibrated(Given(*labelled, *guessed), "self_consistency@4")["m"].reliability == known
