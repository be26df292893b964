"""Recordings as replay uses them: dense arrays of signals, cut and filled to each branch's intervals and probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controllers import Signal
from discovery.data.mapped_recordings import load_mapped, write_mapped
from discovery.data.recordings import RecordedBranch, RecordedQuestion, Recording, check_signals, intern_answers

SIGNALLED = RecordedBranch(["1", None], 25, "7", [9, 9], True, [900, 800, 700], [90, 80, 70], [990, None])
CENSORED = RecordedBranch(["1"], 30, None, [9], False, [600, None, 500], [60, None, 50])
PLAIN = RecordedBranch([], 5, "7")


def interned(*branches: RecordedBranch) -> Recording:
    return intern_answers(RecordedQuestion("q", "m", "b", 10, branches, "7"))


def test_signals_are_dense_arrays_with_a_number_for_unknown_ones() -> None:
    recording = interned(SIGNALLED, CENSORED, PLAIN)
    assert recording.confidences.tolist() == [900, 800, 700, 600, -1, -1]
    assert recording.lowests.tolist() == [90, 80, 70, 60, -1, -1]
    assert recording.probe_confidences.tolist() == [990, -1, -1]
    for values in (recording.confidences, recording.lowests, recording.probe_confidences):
        assert values.dtype == np.int16
        assert not values.flags.writeable


def test_rows_have_the_signals_of_their_branch() -> None:
    signals = [row[5:] for row in interned(SIGNALLED, CENSORED, PLAIN).rows]
    assert signals == [
        ([900, 800, 700], [90, 80, 70], [990, -1]),
        ([600, -1], [60, -1], [-1]),
        ([-1], [-1], []),
    ]


@pytest.mark.parametrize(
    ("branch", "signals"),
    [
        (SIGNALLED, {Signal.INTERVALS, Signal.PROBES}),
        (CENSORED, {Signal.INTERVALS}),
        (SIGNALLED._replace(confidences=(), lowests=()), {Signal.PROBES}),
        (SIGNALLED._replace(confidences=[None] * 3, lowests=[None] * 3, probe_confidences=[None] * 2), set()),
        (PLAIN, set()),
    ],
)
def test_a_recording_has_the_signals_known_of_any_branch(branch: RecordedBranch, signals: set[Signal]) -> None:
    recording = interned(PLAIN, branch)
    assert recording.signals == signals
    assert recording.has_signals == bool(signals)


def test_a_recording_without_signals_keeps_no_arrays_of_them() -> None:
    recording = interned(PLAIN, SIGNALLED._replace(confidences=(), lowests=(), probe_confidences=()))
    assert recording.confidences.size == recording.lowests.size == recording.probe_confidences.size == 0
    assert [row[5:] for row in recording.rows] == [((), (), ())] * 2


@pytest.mark.parametrize("branch", [SIGNALLED, CENSORED, PLAIN])
def test_mapped_recordings_keep_signals(tmp_path: Path, branch: RecordedBranch) -> None:
    (mapped,) = load_mapped(write_mapped([interned(branch)], tmp_path / "mapped"))
    assert mapped.rows == interned(branch).rows
    assert mapped.signals == interned(branch).signals


@pytest.mark.parametrize("branch", [SIGNALLED, CENSORED, PLAIN, CENSORED._replace(confidences=[6], lowests=[5])])
def test_signals_that_fit_their_branch_pass(branch: RecordedBranch) -> None:
    check_signals(branch)


@pytest.mark.parametrize("value", [-1, 1001, True, 0.5, "9"])
@pytest.mark.parametrize("name", ["confidences", "lowests", "probe_confidences"])
def test_a_signal_out_of_range_is_refused(name: str, value: object) -> None:
    changed: dict[str, Any] = {name: [value, *getattr(SIGNALLED, name)[1:]]}
    with pytest.raises(ValueError, match=f"{name} has {value!r}; use null or an integer from 0 to 1000"):
        check_signals(SIGNALLED._replace(**changed))
