"""Traced rounds: what a trace returns are the rounds that were played, whichever facts have numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controllers import TO_END, Limits, Round, State, advance, answer, branch, probe, prune
from controllers.loading import Spec
from discovery.data.recordings import Cell, RecordedBranch, RecordedQuestion, Recording, Split, intern_answers
from discovery.data.traces import TraceWriter, read_trace, trace_files
from discovery.evaluation.replay import ReplayEnvironment
from discovery.evaluation.traced_rounds import NUMBERED, SHORT, RoundColumns, TracedRounds

WIDTH = NUMBERED + 6


def _recording(interval: int) -> Recording:
    """A recording of more branches than have numbers, some of which finish early."""
    branches = [
        RecordedBranch([str((at + step) % 4) if step else None for step in range(2 + at % 30)], 3000, str(at % 3))
        for at in range(WIDTH)
    ]
    return intern_answers(RecordedQuestion("00" * 32, "m", "b", interval, branches, "1"))


def _play(recording: Recording, traced: TracedRounds) -> tuple[State, list[Round]]:
    """Play rounds with all kinds of actions: long advances, branches that finish, probes, prunes, an answer."""
    environment = ReplayEnvironment(recording, range(WIDTH), 7)
    state, rounds = State(Limits(recording.interval, WIDTH)), []
    for number in range(12):
        if not state.width:
            actions = [branch()] * (WIDTH - 1)
        elif number == 5:
            actions = [prune(state.active[0]), branch(TO_END), *(advance(i, SHORT + 1) for i in state.active[1:])]
        else:
            steps = [advance(i, 1 + (i % 7 == 0)) for i in state.active]
            actions = [action for step in steps for action in (step, probe(step.branch))] if number % 3 else steps
        actions = [answer(state.leader())] if number == 11 else actions
        state.check(actions)
        state.apply(actions, environment.carry_out(actions))
        assert state.last is not None
        rounds.append(state.last)
        traced.add(state, state.last)
    return state, rounds


@pytest.mark.parametrize("intervals", [(50, 50), (50, 80)])
def test_traces_return_the_rounds_that_were_played(tmp_path: Path, intervals: tuple[int, int]) -> None:
    recordings = [_recording(interval) for interval in intervals]
    columns = RoundColumns(intervals[0], 7)
    played = []
    for recording in recordings:
        traced = columns.begin(recording.interval)
        state, rounds = _play(recording, traced)
        columns.add(traced, state, True)
        played.append(rounds)
    writer = TraceWriter(Spec("cmc"), 1.0, Cell("m", "b", Split.SEARCH), recordings)
    trace = read_trace(writer.save(tmp_path, range(1), columns.arrays()))
    assert [[(list(actions), list(facts)) for actions, facts in trace.rounds(at)] for at in range(2)] == [
        [(list(actions), list(facts)) for actions, facts in rounds] for rounds in played
    ]


def test_facts_are_numbered_as_they_first_occur_also_if_episodes_ran_at_the_same_time() -> None:
    recording = _recording(50)
    apart, mixed = RoundColumns(50, 7), RoundColumns(50, 7)
    for columns in (apart, mixed):
        begun = [columns.begin(50) for _ in range(3)]
        ended = [_play(recording, traced)[0] for traced in (begun if columns is apart else begun[::-1])]
        for traced, state in list(zip(begun, ended, strict=True))[: 3 if columns is apart else 2]:
            columns.add(traced, state, True)
    first, second = apart.arrays(), mixed.arrays()  # the third episode was played again, so that its facts are unused
    facts = second["facts"]
    assert (first["facts"][: len(facts)] == facts).all()
    assert (first["table"][: len(second["table"])] == second["table"]).all()
    assert np.unique(facts).size == len(second["table"])


def test_columns_without_episodes_are_empty() -> None:
    assert [array.size for array in RoundColumns(50, 0).arrays().values()] == [0] * 7


@pytest.mark.parametrize(
    ("model", "benchmark", "controller", "folder"),
    [
        ("m", "b", "cmc", "m/b/search/cmc-beta-1"),
        ("org/m", "b", "found 1", "org/m/b/search/found 1-beta-1"),
        ("{home}/models/Qwen3-8B", "b", "cmc", "{home}/models/Qwen3-8B-????????/b/search/cmc-beta-1"),
        ("m", "{home}/b", "cmc", "m/{home}/b-????????/search/cmc-beta-1"),
        ("../../m", "..", "../../c", "m-????????/????????/search/c-beta-1-????????"),
        ("m/.", "b//", "cmc", "m-????????/b-????????/search/cmc-beta-1"),
        ("", "b", "cmc", "????????/b/search/cmc-beta-1"),
        ("m\0\ud800", "b", "cmc", "m__-????????/b/search/cmc-beta-1"),
        ("é" * 300, "b", "cmc", f"{'é' * 120}-????????/b/search/cmc-beta-1"),
    ],
)
def test_traces_stay_in_their_folder_whatever_the_names_are(
    tmp_path: Path, model: str, benchmark: str, controller: str, folder: str
) -> None:
    home = tmp_path / "a" / "b" / "c"
    model, benchmark = (name.replace("{home}", str(tmp_path)) for name in (model, benchmark))
    folder = folder.replace("{home}", str(tmp_path)[1:])
    writer = TraceWriter(Spec(controller), 1.0, Cell(model, benchmark, Split.SEARCH), [_recording(50)])
    path = writer.save(home, range(1), RoundColumns(50, 0).arrays())
    assert path.relative_to(home).match(f"{folder}/0000.npz")
    assert trace_files(home) == list(tmp_path.rglob("*.npz")) == [path]
    assert (read_trace(path).about["model"], read_trace(path).about["benchmark"]) == (model, benchmark)


def test_names_of_which_the_same_parts_are_left_have_folders_of_their_own(tmp_path: Path) -> None:
    named = str(tmp_path)[1:]
    for model in (named, f"/{named}", f"../{named}", f"/{named}/"):
        writer = TraceWriter(Spec("cmc"), 1.0, Cell(model, "b", Split.SEARCH), [_recording(50)])
        writer.save(tmp_path / "home", range(1), RoundColumns(50, 0).arrays())
    assert len(trace_files(tmp_path / "home")) == 4
