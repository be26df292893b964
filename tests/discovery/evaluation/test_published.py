"""Reproduce the published figures on the public recordings. Skipped where the recordings are not available.

Every cell of the AutoTTS paper's Table 1 that the recordings cover is reproduced, except two rows: ASC on Qwen3-4B ran
with at most 40 chains, and Parallel-Probe on Qwen3-1.7B with settings nobody published.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from controllers import Controller, Limits, Round, State, Verb, run_episode, run_sync
from controllers.builtin import create
from controllers.loading import parse_spec
from discovery.answers import Judge
from discovery.data.importers import read_release, release_cell
from discovery.data.recordings import Recording, intern_answers
from discovery.evaluation.evaluate import regrade
from discovery.evaluation.replay import ReplayEnvironment, shuffled_order
from discovery.evaluation.replay_jobs import Job, ReplayRules, run_job
from discovery.evaluation.scores import gather_scores
from tests.fakes import Eager

FOLDER = Path(__file__).parents[4] / "shared" / "replay"
SHUFFLES = 100
FEWER = 40
"""Shuffles for comparisons of two gradings, which need no match with a printed figure."""

pytestmark = [
    pytest.mark.xdist_group("published"),  # so that one worker reads the recordings
    pytest.mark.slow,
    pytest.mark.no_cover,  # half a million episodes would take six times as long
    pytest.mark.skipif(
        not (FOLDER / "autotts").is_dir(), reason="the public recordings are not beside the project (../shared/replay)"
    ),
]

MODELS = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B")
BENCHMARKS = ("aime24", "aime25")
METHODS = {  # name in the table: (controller, β)
    "SC@64": ("self_consistency", 1.0),
    "ASC": ("asc", 1.0),
    "ESC": ("esc", 1.0),
    "Parallel-Probe": ("parallel_probe", 1.0),
    "AutoTTS b=0.5": ("cmc", 0.5),
    "AutoTTS b=1.0": ("cmc", 1.0),
}
OTHERWISE = {("Qwen3-4B", "ASC"): ("asc@40", 1.0)}  # the settings the row was really run with
UNPUBLISHED = {("Qwen3-1.7B", "Parallel-Probe")}  # settings unknown
PRINTED = [(model, method) for model in MODELS for method in METHODS if (model, method) not in UNPUBLISHED]
EVERY_DAY = ("Qwen3-1.7B", "aime25")
"""Recordings that `make test` replays; `make soak` replays the rest."""


def with_soak(*rows: tuple[Any, ...]) -> list[Any]:
    """Parameters that begin with a model and a benchmark, all but those of EVERY_DAY marked `soak`."""
    return [pytest.param(*row, marks=() if row[:2] == EVERY_DAY else pytest.mark.soak) for row in rows]


@cache
def recordings(path: Path) -> list[Recording]:
    return [intern_answers(recorded) for recorded in read_release(path)]


@cache
def measure(model: str, benchmark: str, controller: str, beta: float, shuffles: int = SHUFFLES) -> tuple[float, float]:
    """Accuracy in percent and mean tokens over the shuffles."""
    path = FOLDER / "autotts" / model / f"{benchmark}.json.xz"
    job = Job(parse_spec(controller), beta, release_cell(path), range(shuffles))
    (score,) = gather_scores([(job, run_job(job, recordings(path), ReplayRules()))])
    assert not score.failures
    return score.accuracy, score.mean("tokens")


def printed(model: str, benchmark: str, controller: str, beta: float) -> tuple[str, str]:
    """Return percent and thousands of tokens as the table prints them, truncated to whole tokens before rounding."""
    accuracy, tokens = measure(model, benchmark, controller, beta)
    return f"{accuracy:.1f}", f"{int(tokens) / 1000:.1f}"


@cache
def table() -> dict[tuple[str, str], dict[str, str]]:
    with (FOLDER / "table1.csv").open() as file:
        return {(row["model"], row["method"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("model", "benchmark", "method"),
    with_soak(*((model, benchmark, method) for model, method in PRINTED for benchmark in BENCHMARKS)),
)
def test_each_cell_of_the_published_table_is_reproduced_as_printed(model: str, benchmark: str, method: str) -> None:
    row = table()[model, method]
    ours = printed(model, benchmark, *OTHERWISE.get((model, method), METHODS[method]))
    assert ours == (row[f"{benchmark}_acc"], row[f"{benchmark}_ktokens"])


def test_every_row_of_the_published_table_is_listed_here() -> None:
    assert {*PRINTED, *UNPUBLISHED} == set(table())


@pytest.mark.parametrize(
    ("model", "benchmark", "controller", "figures"),
    with_soak(
        ("Qwen3-4B", "aime24", "asc@64", ("80.0", "214.2")),
        ("Qwen3-4B", "aime25", "asc@64", ("76.6", "325.1")),
        ("Qwen3-1.7B", "aime24", "parallel_probe", ("66.0", "745.4")),
        ("Qwen3-1.7B", "aime25", "parallel_probe", ("44.4", "776.6")),
    ),
)
def test_the_two_deviating_rows_under_the_common_settings_give_these_figures(
    model: str, benchmark: str, controller: str, figures: tuple[str, str]
) -> None:
    assert printed(model, benchmark, controller, 1.0) == figures


@pytest.mark.soak
@pytest.mark.parametrize(
    ("model", "controller", "beta", "accuracy", "tokens"),
    [
        ("Qwen3-0.6B", "self_consistency", 1.0, 21.43, 1_008_629),
        ("Qwen3-0.6B", "asc", 1.0, 21.40, 805_491),
        ("Qwen3-0.6B", "esc", 1.0, 21.43, 986_723),
        ("Qwen3-0.6B", "parallel_probe", 1.0, 21.83, 773_782),
        ("Qwen3-0.6B", "cmc", 0.0, 15.13, 56_714),
        ("Qwen3-0.6B", "cmc", 0.5, 19.20, 283_597),
        ("Qwen3-0.6B", "cmc", 1.0, 20.93, 542_155),
        ("Qwen3-8B", "cmc", 0.0, 81.40, 48_796),
        ("Qwen3-8B", "cmc", 0.5, 84.27, 255_294),
        ("Qwen3-8B", "cmc", 1.0, 85.77, 467_428),  # 467,435 elsewhere, for a reason not found; the table has 467.4k
    ],
)
def test_unrounded_figures_are_reproduced_to_the_token(
    model: str, controller: str, beta: float, accuracy: float, tokens: int
) -> None:
    measured = measure(model, "aime24", controller, beta)
    assert (round(measured[0], 2), round(measured[1])) == (accuracy, tokens)


# Answers compared as the proxy compares them


@cache
def regraded(path: Path) -> list[Recording]:
    with Judge() as judge:
        return [regrade(recorded, judge) for recorded in read_release(path)]


LOWER = {  # accuracy in points where reading answers lowers a figure, and why
    # One question, whose majority is wrong (55 of 128 chains end in 8, 28 in the right 77): -3/5 and \\frac{-3}{5} are
    # one answer now, so other chains are pruned as deviants, and what was 91 % right is 76 %.
    ("Qwen3-1.7B", "aime25", "parallel_probe"): -0.6,
}


@pytest.mark.process
@pytest.mark.parametrize(
    ("model", "benchmark"), with_soak(*((model, benchmark) for model in MODELS for benchmark in BENCHMARKS))
)
def test_canonical_grading_lowers_no_accuracy_but_the_listed_ones(model: str, benchmark: str) -> None:
    path = FOLDER / "autotts" / model / f"{benchmark}.json.xz"
    for controller, beta in [*METHODS.values(), ("short_m_at_k@24", 1.0)]:
        job = Job(parse_spec(controller), beta, release_cell(path), range(FEWER))
        (score,) = gather_scores([(job, run_job(job, regraded(path), ReplayRules()))])
        exact = measure(model, benchmark, controller, beta, FEWER)[0]
        gain = round(score.accuracy, 1) - round(exact, 1)
        assert gain >= LOWER.get((model, benchmark, controller), -0.01), (controller, beta, exact, score.accuracy)


@pytest.mark.soak
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("controller", "beta"), [("cmc", 1.0), ("parallel_probe", 0.5), ("parallel_probe", 1.0)])
def test_lazy_probing_changes_no_decision_on_public_recordings(model: str, controller: str, beta: float) -> None:
    asked = eagerly = 0
    for recording in regraded(FOLDER / "autotts" / model / "aime24.json.xz"):
        lazy, probes = _episode(recording, create(controller, beta))
        eager, all_probes = _episode(recording, Eager(create(controller, beta)))
        assert lazy == eager
        asked, eagerly = asked + probes, eagerly + all_probes
    assert asked < (0.6 if controller == "cmc" else 0.97) * eagerly


def _episode(recording: Recording, controller: Controller) -> tuple[object, int]:
    """Play an episode. Return `(outcome, number of probes)`."""
    environment, state = (
        ReplayEnvironment(recording, shuffled_order(recording.branches, 0)),
        State(Limits(recording.interval)),
    )
    rounds: list[Round] = []
    run_sync(run_episode(controller, environment, state, lambda _, played: rounds.append(played)))
    what = environment.is_right(state.answer), [(b.tokens, b.finished, b.pruned) for b in state.branches]
    return what, sum(action.verb is Verb.PROBE for played in rounds for action in played.actions)


@pytest.mark.parametrize(
    ("model", "benchmark", "multiples"),
    with_soak(
        ("Qwen3-1.7B", "aime25", {0.25: "6.0", 0.5: "17.2", 0.75: "22.5", 1.0: "26.4"}),
        ("Qwen3-8B", "aime25", {0.25: "4.7", 0.5: "13.8", 0.75: "16.6", 1.0: "20.1"}),
    ),
)
def test_the_page_on_beta_has_the_cost_of_the_default_as_a_multiple_of_one_chain(
    model: str, benchmark: str, multiples: dict[float, str]
) -> None:
    _, plain = measure(model, benchmark, "single", 0.5, 10)
    measured = {beta: measure(model, benchmark, "adaptive_consistency", beta, 10)[1] / plain for beta in multiples}
    assert {beta: f"{value:.1f}" for beta, value in measured.items()} == multiples
    page = (Path(__file__).parents[3] / "docs" / "beta.md").read_text("utf-8")
    column = {"Qwen3-1.7B": 3, "Qwen3-8B": 4}[model]
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| β = ")]
    assert [row[column].strip(" ×") for row in rows] == list(multiples.values())
