"""The page on signals: its controller runs with and without signals, and its recording can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

from controllers import Limits, Signal, State, run_episode, run_sync
from controllers.advice import advise
from controllers.loading import Spec, make
from controllers.signals import NO_SIGNALS
from discovery.data.importers import parse_recording_line
from discovery.data.recordings import RecordedBranch, RecordedQuestion, intern_answers
from discovery.evaluation.replay import ReplayEnvironment
from tests.docs.blocks import fenced_blocks

ROOT: Final = Path(__file__).parents[2]
BLOCKS: Final = {block.language: block.code for block in fenced_blocks(ROOT / "docs/signals.md", ROOT)}


def test_the_controller_weighs_votes_by_confidence_and_votes_plainly_without() -> None:
    spec = Spec("weighted", BLOCKS["python"])
    assert advise(BLOCKS["python"]) == []
    assert spec.signals == {Signal.INTERVALS}
    doubtful, sure = (
        RecordedBranch([], 60, "8", (), True, [300], [200]),
        RecordedBranch([], 60, "7", (), True, [900], [800]),
    )
    recording = intern_answers(RecordedQuestion("q", "m", "b", 100, [*[doubtful] * 5, *[sure] * 3], "7"))
    answers = []
    for signals in (spec.signals, NO_SIGNALS):
        environment = ReplayEnvironment(recording, range(8), signals=signals)
        state = State(Limits(100))
        run_sync(run_episode(make(spec, 1.0), environment, state))
        answers.append(environment.is_right(state.answer))
    assert answers == [True, False]


def test_the_recording_can_be_read() -> None:
    branch = parse_recording_line(json.dumps(json.loads(BLOCKS["json"])).encode()).recorded().branches[0]
    assert (branch.confidences, branch.lowests, branch.probe_confidences) == ([912, 874], [640, 702], [990])


@pytest.mark.parametrize("key", ["confidences", "lowests", "probe_confidences"])
def test_the_page_names_every_key(key: str) -> None:
    assert f"| `{key}` |" in (ROOT / "docs/signals.md").read_text()
