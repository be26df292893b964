"""Recordings of a cell as flat records, and the orders in which their branches are opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.signals import LOG_CONFIDENCE, MAX_CONFIDENCE, Signal
from discovery.data.recordings import UNKNOWN, BranchRow, Recording
from discovery.errors import BranchCensored
from discovery.evaluation.replay import shuffled_order, span_signals
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.search.kernel.records import BRANCH, INTERVAL, PROBE, QUESTION, UNSEEN_WINDOW, Records


class CellRecords(NamedTuple):
    """All questions of one cell; see `records` for the fields."""

    questions: Records
    branches: Records
    probes: Records
    intervals: Records


def cell_records(recordings: Sequence[Recording], rules: ReplayRules) -> CellRecords:
    """Return recordings as records, with costs and signals as `rules` have them. Raises BranchCensored."""
    for recording in recordings:
        if not recording.complete.all():
            raise BranchCensored(f"question {recording.question[:12]} has branches that were not recorded to their end")
    kinds = {kind: number for number, kind in enumerate(_order_kinds(recordings))}
    questions = np.zeros(len(recordings), QUESTION)
    questions["interval"] = [recording.interval for recording in recordings]
    questions["reference"] = [recording.reference for recording in recordings]
    questions["width"] = [min(rules.max_branches, recording.branches) for recording in recordings]
    questions["order"] = [kinds[_order_kind(recording)] for recording in recordings]
    questions["branch"] = np.cumsum([0, *(recording.branches for recording in recordings)])[:-1]
    branches = np.zeros(sum(recording.branches for recording in recordings), BRANCH)
    branches["probes"] = np.concatenate([np.diff(recording.starts) for recording in recordings])
    branches["probe"] = np.cumsum(branches["probes"]) - branches["probes"]
    branches["start"] = branches["probe"] + np.arange(len(branches))
    branches["tokens"] = np.concatenate([recording.tokens for recording in recordings])
    branches["final"] = np.concatenate([recording.finals for recording in recordings])
    probes = np.concatenate([_probe_records(recording, rules) for recording in recordings])
    intervals = np.concatenate([_interval_records(recording, rules) for recording in recordings])
    return CellRecords(questions, branches, probes, intervals)


def branch_orders(recordings: Sequence[Recording], shuffles: range) -> NDArray[np.int64]:
    """Return the orders of branches: (kinds, shuffles, branches), with kinds as `QUESTION.order` counts them."""
    kinds = _order_kinds(recordings)
    orders = np.zeros((len(kinds), len(shuffles), max(branches for branches, _ in kinds)), np.int64)
    for number, (branches, greedy_first) in enumerate(kinds):
        for at, seed in enumerate(shuffles):
            orders[number, at, :branches] = shuffled_order(branches, seed, greedy_first)
    return orders


def _order_kind(recording: Recording) -> tuple[int, bool]:
    """Return what an order of branches depends on, other than the shuffle."""
    return recording.branches, recording.greedy_first


def _order_kinds(recordings: Sequence[Recording]) -> list[tuple[int, bool]]:
    return list(dict.fromkeys(map(_order_kind, recordings)))


def _probe_records(recording: Recording, rules: ReplayRules) -> Records:
    probes = np.zeros(len(recording.probes), PROBE)
    probes["answer"] = recording.probes
    probes["tokens"] = recording.probe_tokens if rules.probe_tokens is None else rules.probe_tokens
    probes["log_confidence"] = np.nan
    if Signal.PROBES in recording.signals & rules.signals:
        probes["log_confidence"] = [_logarithm(sure) for sure in recording.probe_confidences.tolist()]
    return probes


def _interval_records(recording: Recording, rules: ReplayRules) -> Records:
    starts = (recording.starts + np.arange(recording.branches + 1)).tolist()  # first interval of each branch
    intervals = np.zeros(starts[-1], INTERVAL)
    for name in ("log_confidence", "log_probability"):
        intervals[name] = np.nan
    for name in ("lowest", "lowest_so_far"):
        intervals[name] = UNSEEN_WINDOW
    if Signal.INTERVALS in recording.signals & rules.signals:
        for start, row in zip(starts, recording.rows, strict=False):
            _add_signals(intervals[start : start + len(row.probes) + 1], row, recording.interval)
    return intervals


def _add_signals(intervals: Records, row: BranchRow, delta: int) -> None:
    """Add the signals of a branch to its intervals."""
    last = len(row.probes)
    for at in range(last + 1):
        for more in range(min(2, last + 1 - at)):
            sure, least = span_signals(row, delta, at, at + more + 1)
            intervals["log_confidence"][at, more] = _logarithm(UNKNOWN if sure is None else sure)
            intervals["lowest"][at, more] = UNSEEN_WINDOW if least is None else least
    length = np.full(last + 1, delta, np.int64)
    length[-1] = max(0, row.tokens - last * delta)
    gained = length * intervals["log_confidence"][:, 0]
    gained[length == 0] = 0.0 if last else np.nan  # an interval without tokens changes nothing
    intervals["log_probability"] = np.cumsum(gained)  # one by one, as `State` adds
    so_far = np.minimum.accumulate(np.where(length == 0, MAX_CONFIDENCE, intervals["lowest"][:, 0]))
    intervals["lowest_so_far"] = np.where(np.isnan(intervals["log_probability"]), UNSEEN_WINDOW, so_far)


def _logarithm(confidence: int) -> float:
    return float("nan") if confidence == UNKNOWN else LOG_CONFIDENCE[confidence]
