"""The choice of a controller for each model: its formula, its error rate by simulation, and `autotts calibrate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.commands.calibrate import left_out
from discovery.data.importers import format_recording_line
from discovery.data.recordings import Split
from discovery.evaluation.calibration import read_calibrations, score_with_rival
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.paired_statistics import student_quantile
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.promotion.controller_choice import ModelGains, choose, compare_choices, gains_over
from discovery.promotion.registry import ChangeCause, Registry
from proxy.cli import app
from tests.discovery.evaluation.test_evaluate import Given
from tests.discovery.promotion.choice_simulation import Scenario, rows, simulate
from tests.discovery.promotion.examples import FORCED, HELD_OUT_CELLS, NOON
from tests.discovery.promotion.outside import folder_of
from tests.discovery.promotion.test_gate import FIRST, LONGER, SHORTER, question


def gains(*columns: list[float], allowed: list[bool] | None = None) -> ModelGains:
    """Return gains with one column per candidate."""
    values = np.column_stack([np.array(column, float) for column in columns])
    questions = [f"q{number:02}" for number in range(len(values))]
    return ModelGains(questions, values, np.array(allowed or [True] * len(columns)))


def noisy(mean: float, seed: int, questions: int = 30, spread: float = 4.0) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, spread, questions)
    return list(noise - noise.mean() + mean)


def test_the_candidate_with_the_largest_gain_is_chosen_if_the_gain_is_sure() -> None:
    choice = choose({"m": gains(noisy(1, 1), noisy(6, 2), noisy(-6, 3))})["m"]
    assert choice.candidate == 1
    assert choice.advantage == pytest.approx(6)
    assert 0 < choice.bound < choice.shrunk < choice.advantage


@pytest.mark.parametrize("mean", [-3, 0, 0.9])
def test_the_default_is_kept_unless_the_gain_is_sure(mean: float) -> None:
    assert choose({"m": gains(noisy(mean, 1))})["m"].candidate is None


def test_a_candidate_that_may_not_serve_a_model_is_never_chosen() -> None:
    by_model = {"m": gains(noisy(6, 2), noisy(5, 1), allowed=[False, True])}
    assert choose(by_model)["m"].candidate == 1
    by_model = {"m": gains(noisy(6, 2), noisy(5, 1), allowed=[False, False])}
    assert choose(by_model)["m"].candidate is None


def test_the_held_out_gain_of_a_lucky_question_does_not_count() -> None:
    """Check the cross-validation: each candidate gains on one question only, which chooses it for all others."""
    lucky = gains(*np.where(np.eye(20, 4) > 0, 100.0, -1.0).T)
    assert lucky.gains.mean() > 0
    assert choose({"m": lucky})["m"].advantage < 0
    assert choose({"m": lucky})["m"].candidate is None


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_bound_has_the_documented_formula(confidence: float) -> None:
    by_model = {"a": gains(noisy(2, 1)), "b": gains(noisy(5, 2)), "c": gains(noisy(-1, 3))}
    choices = choose(by_model, confidence)
    held = {"a": by_model["a"].gains[:, 0], "b": by_model["b"].gains[:, 0], "c": np.zeros(30)}
    errors = {model: values.std(ddof=1) / math.sqrt(30) for model, values in held.items()}
    variance = np.mean([held[model].mean() ** 2 - errors[model] ** 2 for model in held])
    for model in "ab":
        advantage, error = held[model].mean(), errors[model]
        needed = student_quantile(confidence, 29) * error * math.sqrt(1 + error**2 / variance)
        assert choices[model].advantage == pytest.approx(advantage)
        assert (choices[model].bound > 0) == (advantage > needed)
        assert choices[model].shrunk == pytest.approx(advantage * variance / (variance + error**2))


def test_an_advantage_counts_less_if_other_models_show_none() -> None:
    alone = choose({"a": gains(noisy(2, 1))})["a"]
    among = choose({"a": gains(noisy(2, 1)), **{f"b{at}": gains(noisy(-5, at)) for at in range(9)}})["a"]
    assert alone.advantage == among.advantage
    assert 0 < among.shrunk < alone.shrunk


@pytest.mark.parametrize("questions", [1, 2, 9])
def test_with_fewer_than_ten_questions_the_default_is_kept(questions: int) -> None:
    choice = choose({"m": gains([50.0 + number for number in range(questions)])})["m"]
    assert (choice.candidate, choice.questions) == (None, questions)


def test_equal_gains_on_every_question_are_sure() -> None:
    assert choose({"m": gains([2.0] * 30)})["m"].candidate == 0
    assert choose({"m": gains([0.0] * 30)})["m"].candidate is None


# Simulation


def test_candidates_that_are_all_worse_are_rarely_chosen() -> None:
    ours, naive, best = simulate(Scenario("", -0.5, 0.0), drawn=300)
    assert ours.worse < 5
    assert ours.gain > -0.05
    assert (naive.worse > 50, best) == (True, 0)


def test_a_real_difference_is_found_and_seldom_in_the_wrong_direction() -> None:
    ours, naive, best = simulate(Scenario("", -1.0, 4.0), drawn=200)
    assert ours.worse < 2 < naive.worse
    assert ours.gain > 0.6 * best


@pytest.mark.slow
def test_a_single_model_is_not_harmed_by_candidates_that_are_all_worse() -> None:
    ours, _, _ = simulate(Scenario("", -0.5, 0.0, models=1), drawn=1000)
    assert ours.worse < 8
    assert ours.gain > -0.05


@pytest.mark.soak
def test_the_manual_has_the_simulated_table() -> None:
    assert "\n".join(rows()) in (Path(__file__).parents[3] / "docs" / "calibration.md").read_text()


# Comparison with one controller for all


def test_a_choice_by_model_beats_one_for_all_if_models_need_different_controllers() -> None:
    by_model = {
        "a": gains(noisy(6, 1), noisy(-6, 2)),
        "b": gains(noisy(-6, 3), noisy(6, 4)),
        "c": gains(noisy(-6, 5), noisy(-6, 6)),
    }
    comparison = compare_choices(by_model)
    assert comparison.over_default.mean == pytest.approx(4)
    assert comparison.over_default.low > 2
    assert comparison.over_single.mean >= comparison.over_default.mean
    assert [set(comparison.chosen[model]) for model in "abc"] == [{0}, {1}, {None}]
    assert comparison.models["c"][0].mean == 0
    assert len(comparison.singles) == 10


def test_if_one_controller_is_best_for_all_models_a_choice_by_model_gains_nothing_over_it() -> None:
    comparison = compare_choices({model: gains(noisy(6, seed)) for seed, model in enumerate("abc")})
    assert set(comparison.singles) == {0}
    assert comparison.over_single.mean == 0
    assert comparison.over_default.mean == pytest.approx(6)


# Recordings

MIXED = Given(
    *(question(number, "m", Split.SEARCH, SHORTER, LONGER) for number in range(20)),
    *(question(number, "n", Split.SEARCH, LONGER, SHORTER) for number in range(20)),
)


def measured(*names: str, slowdown: float = 1.25) -> dict[str, ModelGains]:
    specs = [Spec(name) for name in names]
    engine = make_engine(EngineName.LOCAL)
    scores = score_with_rival(MIXED, MIXED.cells(), specs, engine, ReplayRules(16), [0.0, 0.5], 2)
    sides = {side.spec.name: side for side in scores.sides}
    by_model = gains_over(sides[names[0]], [sides[name] for name in names[1:]], scores, slowdown)
    for cell in MIXED.cells():
        for at, name in enumerate(names[1:]):
            difference = sides[name].curves[cell].afs - sides[names[0]].curves[cell].afs
            assert by_model[cell.model].gains[:, at].mean() == pytest.approx(difference)
    return by_model


def test_the_mean_gain_of_a_model_is_its_difference_of_afs() -> None:
    by_model = measured("self_consistency", "short_m_at_k")
    assert by_model["m"].gains.mean() > 5
    assert by_model["n"].gains.mean() < -5
    assert len(by_model["m"].questions) == 20


def test_a_controller_with_a_longer_critical_path_may_not_serve() -> None:
    assert not measured("self_consistency", "asc")["m"].allowed.any()
    assert measured("self_consistency", "asc", slowdown=100)["m"].allowed.all()


# The command


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(format_recording_line(recorded) for recorded in MIXED.recordings))
    return path


def run(recordings: Path, controllers: str, *more: object) -> tuple[int, str]:
    folder = recordings.parent
    options = [
        "--recordings",
        recordings,
        "--out",
        folder / "c.json",
        "--max-branches",
        16,
        "--controllers",
        controllers,
    ]
    arguments = [*options, "--shuffles", 2, "--betas", "0,0.5", "--engine", "local", *more]
    done = CliRunner().invoke(app, ["calibrate", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


def test_the_choice_of_each_model_is_in_the_calibration_file_and_the_table(recordings: Path) -> None:
    status, output = run(recordings, "self_consistency,short_m_at_k")
    assert status == 0, output
    assert "controller of each model; the default is self_consistency" in output
    by_model = read_calibrations(recordings.parent / "c.json")
    choices = {model: calibration.choice for model, calibration in by_model.items()}
    assert {model: choice and choice.controller for model, choice in choices.items()} == {
        "m": "short_m_at_k",
        "n": "self_consistency",
    }
    choice = choices["m"]
    assert choice is not None
    assert (choice.digest, choice.default, choice.questions) == (Spec("short_m_at_k").digest, "self_consistency", 20)
    assert 0 < choice.bound < choice.shrunk <= choice.advantage
    assert "choice" not in json.loads((recordings.parent / "c.json").read_text())["m"]["others"][0]


@pytest.mark.slow
def test_the_comparison_is_printed_with_intervals_and_the_worst_model(recordings: Path) -> None:
    status, output = run(recordings, "self_consistency,short_m_at_k", "--compare")
    assert status == 0, output
    assert "10 short_m_at_k" in output
    for row in ("mean of models", "worst model"):
        assert f"│ {row} │ +" in output.replace("│ worst model │ -", "│ worst model │ +")


@pytest.mark.slow
def test_choices_become_champions_of_their_models_and_are_audited(recordings: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    option = ("--registry", registry.place, "--who", "ada")
    status, output = run(recordings, "self_consistency,short_m_at_k", *option)
    assert status == 0, output
    assert "model m: short_m_at_k is champion, in place of self_consistency" in output
    assert "model n: no controller is surely better than self_consistency" in output
    state = registry.read()
    assert {model: holders.champion for model, holders in state.models.items()} == {"m": Spec("short_m_at_k").digest}
    (line,) = registry.audit()
    assert (line["who"], line["model"]) == ("ada", "m")
    assert "points of AFS over self_consistency, cross-validated over 20 questions" in line["why"]
    assert registry.card(Spec("short_m_at_k").digest)["choice"]["controller"] == "short_m_at_k"
    _, output = run(recordings, "self_consistency,short_m_at_k", *option)
    assert "model m: short_m_at_k is its champion already" in output
    assert len(registry.audit()) == 1


@pytest.mark.slow
def test_a_chosen_file_must_be_installed_first(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReplayRules, "seal", lambda *_: False)  # no process in a unit test
    registry = Registry(tmp_path / "registry")
    file = tmp_path / "first.py"
    file.write_text(FIRST)
    status, output = run(recordings, f"self_consistency,{file}", "--registry", registry.place)
    assert status == 2
    assert "first, chosen for model m, is a file that is not installed" in output
    assert not folder_of(registry).folder.exists()
    me = ChangeCause("me", "", NOON)
    card: dict[str, Any] = {"headline": "", "report": {"verdict": "promote", "cells": HELD_OUT_CELLS}}
    registry.install(Spec("first", FIRST), {**card, "models": ["n"]}, RolloutStage.SHADOW, 0, me, "n")
    status, output = run(recordings, "self_consistency,first", "--registry", registry.place)
    assert (status, "first passed the gate on model n only, not on m" in output) == (2, True)
    searched = {"headline": "", "report": {"verdict": "promote", "cells": [{"split": "search"}]}}
    registry.install(Spec("first", FIRST), searched, RolloutStage.SHADOW, 0, me)
    status, output = run(recordings, "self_consistency,first", "--registry", registry.place)
    assert (status, "report is about questions of the search split" in output) == (2, True)
    registry.install(Spec("first", FIRST), card, RolloutStage.SHADOW, 0, me)
    status, output = run(recordings, "self_consistency,first", "--registry", registry.place)
    assert status == 0, output
    assert registry.read().own("m").champion == Spec("first", FIRST).digest


def test_choices_against_another_default_than_the_registrys_are_refused(recordings: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.install(Spec("cmc"), {"headline": ""}, RolloutStage.CHAMPION, 0, ChangeCause("me", "", NOON))
    status, output = run(recordings, "self_consistency,short_m_at_k", "--registry", registry.place)
    assert status == 2
    assert "is cmc" in output
    assert "--controllers begins with self_consistency" in output
    assert not (recordings.parent / "c.json").exists()


def test_a_damaged_card_hides_no_other_controller_and_is_named_if_one_is_not_found(
    recordings: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry, damaged = Registry(tmp_path), "0" * 64
    registry.install(Spec("first", FIRST), {"headline": ""}, RolloutStage.CHAMPION, 0, FORCED)
    (tmp_path / f"{damaged}.json").write_text("{")
    status, output = run(recordings, "cmc,first", "--registry", tmp_path)
    assert (status, "the default's champion in" in output) == (2, True)
    assert caplog.text == ""
    status, output = run(recordings, "first,second", "--registry", tmp_path)
    assert (status, "second" in output) == (2, True)
    assert f"an installed controller that may be named second is left out: {tmp_path}/{damaged}.json" in caplog.text
    status, output = run(recordings, f"first,{damaged[:12]}", "--registry", tmp_path)
    assert (status, "promote the controller's file again" in output) == (2, True)


@pytest.mark.parametrize("option", [("--compare",), ("--registry", "registry")])
def test_a_choice_needs_several_controllers(recordings: Path, option: tuple[str, ...]) -> None:
    status, output = run(recordings, "cmc", *option)
    assert (status, "needs at least two --controllers" in output) == (2, True)


def test_candidates_that_are_too_slow_for_a_model_are_named() -> None:
    by_model = {"a": gains([1.0], [2.0], allowed=[True, False]), "b": gains([1.0], [2.0])}
    (line,) = left_out(by_model, ["quick", "patient"], 1.25)
    expected = "a: left out for a critical path of more than 1.25 times the default's plus an interval (--slowdown): "
    assert line == f"{expected}patient"
