"""Replay: bad files refused whole, and the published figures on the public recordings, where they are beside us."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from controllers import Limits, State, advance, branch, probe, run_episode, run_sync
from controllers.registry import create
from discovery.errors import BadRecording, Censored
from discovery.formats import read_release
from discovery.recordings import RecordedBranch, RecordedQuestion, Recording, intern
from discovery.replay import ReplayEnvironment, shuffled
from tests.fakes import Scripted

RELEASE = Path(__file__).parents[3] / "shared" / "replay" / "autotts"
SHUFFLES = 100

GOOD = {"question": "q", "gold_answer": "7", "probe_freq": 500, "each_branch": [[["1", "7"], 1200, "7"]]}


def recording_of(branches: list[RecordedBranch]) -> Recording:
    return intern(RecordedQuestion("q", "m", "b", 10, branches, "7"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"each_branch": [[["1"], 1200]]}, "question 0"),
        ({"each_branch": [[[1], 1200, "7"]]}, "branch 0: answers must be strings"),
        ({"each_branch": [[["1"], -3, "7"]]}, "branch 0: -3 is no number of tokens"),
        ({"each_branch": []}, "no branches"),
        ({"probe_freq": 0}, "probe_freq is 0"),
        ({"gold_answer": None, "each_branch": None}, "question 0"),
    ],
)
def test_a_malformed_file_is_refused_and_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([GOOD | change]))
    with pytest.raises(BadRecording, match=words) as caught:
        read_release(path)
    assert str(path) in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    whole = lzma.compress(json.dumps([GOOD] * 50).encode())
    for name, content in (("cut.json.xz", whole[:-20]), ("no.json", b"{"), ("object.json", b"{}"), ("a.json", b"[1]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRecording, match=name.split(".", maxsplit=1)[0]):
            read_release(tmp_path / name)
    missing = {key: value for key, value in GOOD.items() if key != "gold_answer"}
    (tmp_path / "m.json").write_text(json.dumps([missing]))
    with pytest.raises(BadRecording, match="has no 'gold_answer'"):
        read_release(tmp_path / "m.json")
    (tmp_path / "good.json.xz").write_bytes(whole)
    assert len(read_release(tmp_path / "good.json.xz")) == 50


def test_a_recording_cannot_be_changed() -> None:
    recording = recording_of([RecordedBranch(["1", None], 25, "7")])
    assert recording.answers == ("1", "7")
    with pytest.raises(ValueError, match="read-only"):
        recording.probes[0] = 3


def test_a_probe_costs_what_was_recorded_or_what_is_supposed() -> None:
    recording = recording_of([RecordedBranch(["7"], 25, "7", [4])])
    for supposed, spent in ((None, 14), (9, 19)):
        state = State(Limits(10))
        script = Scripted([branch(), probe(0)])
        run_sync(run_episode(script, ReplayEnvironment(recording, [0], probe_tokens=supposed), state))
        assert state.spent == spent


def test_more_branches_than_recorded_is_an_error_of_the_environment() -> None:
    recording = recording_of([RecordedBranch(["1"], 25, "7")])
    with pytest.raises(Censored, match="only 1 branches"):
        run_sync(run_episode(Scripted([branch(), branch()]), ReplayEnvironment(recording, [0]), State(Limits(10))))


def test_past_the_end_of_a_censored_branch_is_an_error_of_the_environment() -> None:
    recording = recording_of([RecordedBranch(["1", "7"], 25, None, complete=False)])
    state = State(Limits(10))
    script = Scripted([branch(2), probe(0)], [advance(0)])
    with pytest.raises(Censored, match="branch 0 was recorded for 2 intervals and not to its end"):
        run_sync(run_episode(script, ReplayEnvironment(recording, [0]), state))
    assert (state.spent, state.branches[0].label) == (20, 0)


def evaluate(model: str, benchmark: str, controller: str, beta: float) -> tuple[float, float]:
    """Accuracy in percent and mean tokens over all shuffles."""
    right = tokens = episodes = 0
    recordings = [intern(recorded) for recorded in read_release(RELEASE / model / f"{benchmark}.json.xz")]
    for seed in range(SHUFFLES):
        order = shuffled(recordings[0].branches, seed)
        for recording in recordings:
            environment = ReplayEnvironment(recording, order)
            state = State(Limits(recording.interval))
            run_sync(run_episode(create(controller, beta), environment, state))
            right += environment.is_right(state.answer)
            tokens += state.spent
            episodes += 1
    return 100 * right / episodes, tokens / episodes


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the public recordings are not beside the project (../shared/replay)")
@pytest.mark.parametrize(
    ("model", "controller", "beta", "accuracy", "tokens"),
    [
        ("Qwen3-0.6B", "self_consistency", 1, 21.43, 1_008_629),
        ("Qwen3-0.6B", "asc", 1, 21.40, 805_491),
        ("Qwen3-0.6B", "cmc", 0, 15.13, 56_714),
        ("Qwen3-8B", "cmc", 0, 81.40, 48_796),
        ("Qwen3-8B", "cmc", 0.5, 84.27, 255_294),
    ],
)
def test_published_figures_come_out_exactly(
    model: str, controller: str, beta: float, accuracy: float, tokens: int
) -> None:
    measured = evaluate(model, "aime24", controller, beta)
    assert (round(measured[0], 2), round(measured[1])) == (accuracy, tokens)
