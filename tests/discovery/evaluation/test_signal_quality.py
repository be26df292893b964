"""Tests of the quality of signals, on recordings whose signals are known to be good, bad or missing."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from discovery.data.importers import format_recording_line
from discovery.data.recordings import RecordedBranch, RecordedQuestion, intern_answers, question_id
from discovery.evaluation.signal_quality import AGREEMENT, auroc, log_probability, measure_signals
from proxy.cli import app

INTERVAL = 32


def chain(answer: str, confidence: int | None, tokens: int = 80, probe: int | None = None) -> RecordedBranch:
    """Return a chain of three intervals that is equally confident in each."""
    confidences = [] if confidence is None else [confidence] * 3
    return RecordedBranch(
        [answer] * 2,
        tokens,
        answer,
        [9, 9],
        confidences=confidences,
        lowests=confidences,
        probe_confidences=[] if probe is None else [probe] * 2,
    )


def question(number: int, branches: Sequence[RecordedBranch]) -> RecordedQuestion:
    return RecordedQuestion(question_id(str(number)), "m", "b", INTERVAL, branches, reference="right")


def measured(questions: Sequence[RecordedQuestion]):  # type: ignore[no-untyped-def]
    return measure_signals(questions, [intern_answers(one) for one in questions])


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    right = np.array([True, True, False, False])
    assert auroc(np.array([4.0, 3, 2, 1]), right) == 100
    assert auroc(np.array([1.0, 2, 3, 4]), right) == 0
    assert auroc(np.array([1.0, 1, 1, 1]), right) == 50
    assert auroc(np.array([3.0, 1, 2, 0]), right) == 75


def test_auroc_is_undefined_without_both_kinds_or_with_an_unknown_value() -> None:
    assert auroc(np.array([1.0, 2]), np.array([True, True])) == -1
    assert auroc(np.array([1.0, math.nan]), np.array([True, False])) == -1


def test_the_log_probability_of_a_chain_counts_the_tokens_of_each_interval() -> None:
    branch = chain("right", 500, tokens=70)
    assert log_probability(branch, INTERVAL) == pytest.approx(70 * math.log(0.5))
    assert math.isnan(log_probability(chain("right", None), INTERVAL))


def test_confident_chains_that_are_right_give_an_auroc_of_100_and_better_votes() -> None:
    branches = [chain("right", 950, probe=900), *[chain("wrong", 600, probe=300)] * 3]
    quality = measured([question(number, branches) for number in range(5)])
    assert quality.accuracy == 25
    assert quality.by_chain["mean log-probability"].value == 100
    assert quality.by_chain["least confident window"].value == 100
    assert quality.by_chain["confidence of the last probe"].value == 100
    assert quality.by_chain[AGREEMENT].value == 0
    assert [(probe.accuracy, probe.auroc and probe.auroc.value) for probe in quality.probes] == [(25, 100)] * 4
    (vote,) = quality.votes
    assert (vote.chains, vote.plain, vote.weighted and vote.weighted.value) == (4, 0, 100)


def test_short_chains_that_are_wrong_give_an_auroc_of_length_below_50() -> None:
    branches = [chain("right", None, 90), chain("right", None, 70), chain("wrong", None, 66), chain("wrong", None, 80)]
    quality = measured([question(0, branches)])
    assert quality.by_chain["shorter"].value == 25


def test_recordings_without_signals_have_no_figures_of_signals() -> None:
    quality = measured([question(0, [chain("right", None), *[chain("wrong", None)] * 3])])
    assert set(quality.by_chain) == {"shorter", AGREEMENT}
    assert all(probe.auroc is None for probe in quality.probes)
    assert all(vote.weighted is None for vote in quality.votes)


def test_chains_and_probes_without_an_answer_are_wrong_where_no_branch_is_right() -> None:
    cut = RecordedBranch([None] * 2, 80, None, [9, 9], probe_confidences=[300, 300])
    quality = measured([question(0, [chain("wrong", 500, 90, 600), cut])])
    assert quality.accuracy == 0
    assert quality.by_chain == {}
    assert [(probe.accuracy, probe.auroc) for probe in quality.probes] == [(0, None)] * 4


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_tables_or_json(tmp_path: Path, as_json: bool) -> None:
    recordings = tmp_path / "recordings.jsonl"
    branches = [chain("1", 950, probe=900), *[chain("2", 600, probe=300)] * 3]
    questions = [
        RecordedQuestion(question_id(str(number)), "m", "b", INTERVAL, branches, reference="1") for number in range(3)
    ]
    recordings.write_text("".join(format_recording_line(one) for one in questions))
    done = CliRunner().invoke(app, ["signals", "--recordings", str(recordings), *(["--json", "-"] if as_json else [])])
    assert done.exit_code == 0, done.output
    if as_json:
        (cell,) = json.loads(done.stdout)
        assert cell["by_chain"]["mean log-probability"]["value"] == 100
        assert cell["votes"][0]["weighted"]["value"] == 100
    else:
        assert "mean log-probability" in done.stdout
        assert "+100.0" in done.stdout
