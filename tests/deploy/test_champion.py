"""The published champion of the embedded model: it loads, its card is about it, and its recordings show its gain."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from controllers.loading import read
from discovery.data.importers import read_jsonl
from discovery.data.recordings import Split
from discovery.promotion.verdict import GateVerdict, report_of

FOLDER = Path(__file__).parents[2] / "deploy" / "embedded" / "champion"


def test_the_card_is_about_the_file_and_holds_two_promotions() -> None:
    card = json.loads((FOLDER / "champion.json").read_bytes())
    digest = read(FOLDER / "champion.py").digest
    reports = [report_of(report) for report in card["gate"]]
    assert [report.champion for report in reports] == ["adaptive_consistency", "cmc"]
    assert {report.digest for report in reports} == {card["digest"], digest} == {digest}
    for report in reports:
        assert report.verdict is GateVerdict.PROMOTE
        assert report.questions == 400
        assert report.p < report.alpha <= 0.05
        assert report.interval is not None
        assert report.interval[0] > 0


def test_the_frontier_has_every_rival_and_intervals() -> None:
    frontier = json.loads((FOLDER / "frontier.json").read_bytes())
    assert frontier["questions"] == 400
    by_name: dict[str, list[dict[str, float]]] = {}
    for point in frontier["points"]:
        by_name.setdefault(point["controller"], []).append(point)
        assert point["low"] <= point["accuracy"] <= point["high"]
    rivals = {"self_consistency", "asc", "adaptive_consistency", "cmc", "parallel_probe", "short_m_at_k"}
    assert rivals < set(by_name)
    (found,) = set(by_name) - rivals
    assert all(len(points) == 5 for points in by_name.values())
    assert frontier["tokens_at_its_accuracy"][found] < frontier["self_consistency"]["tokens"] / 3


def test_the_recordings_are_held_out_and_have_signals(tmp_path: Path) -> None:
    unpacked = tmp_path / "recordings.jsonl"
    unpacked.write_bytes(lzma.decompress((FOLDER / "recordings.jsonl.xz").read_bytes()))
    recordings = read_jsonl(unpacked)
    assert len(recordings) == 24
    for recording in recordings:
        assert recording.split is Split.HELD_OUT
        assert len(recording.branches) == 48
        assert all(branch.confidences for branch in recording.branches)


def test_the_calibration_chooses_the_champion() -> None:
    calibration = json.loads((FOLDER / "calibration.json").read_bytes())
    choice = calibration["autotts-tiny"]["choice"]
    assert choice["digest"] == read(FOLDER / "champion.py").digest
    assert choice["bound"] > 0
