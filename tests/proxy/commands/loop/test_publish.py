"""Only a finished loop that promoted its finalist can be published, and everything published can be read back."""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from controllers.loading import read
from discovery.data.importers import read_jsonl
from discovery.errors import DiscoveryError
from discovery.promotion.verdict import GateVerdict, report_of
from proxy.commands.loop.progress import LoopPlan, LoopProgress
from proxy.commands.loop.publish import QUESTIONS, publish

SOURCE = "class Found:\n    def __init__(self, beta): ...\n    def decide(self, state): ...\n"
NAME = "found_0123abcd"
HELD_OUT = QUESTIONS + 6


def report(verdict: GateVerdict) -> dict[str, Any]:
    facts = {"alpha": 0.03, "k": 1, "p": 0.001, "delta_afs": 2.0, "interval": (1.0, 3.0), "mde": 1.0, "questions": 30}
    named = {"digest": "d" * 64, "name": NAME, "champion": "cmc", "champion_digest": "c" * 64, "who": "tester"}
    headlines = {"beta": 0.5, "savings": None, "savings_cells": 0, "accuracy": 0.0}
    about = {"conditions": [], "cells": [], "headlines": headlines, "split": "s", "created": "2026-01-01"}
    return report_of({"verdict": verdict, **facts, **named, **about}).as_json()


def loop(folder: Path, *verdicts: GateVerdict) -> LoopProgress:
    """Return a loop that was judged so; it was measured if there are verdicts."""
    progress = LoopProgress.open(folder, LoopPlan(held_out_questions=HELD_OUT))
    progress.save("discover", {"name": NAME})
    if verdicts:
        progress.save("gate", [report(verdict) for verdict in verdicts])
        progress.save("measure", {"points": [], "self_consistency": {"accuracy": 70.0}, "tokens_at_its_accuracy": {}})
    return progress


def test_an_unfinished_loop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match=r"loop\.json: no such file; name the folder of a loop"):
        publish(tmp_path, tmp_path / "out")
    loop(tmp_path)
    with pytest.raises(DiscoveryError, match="the loop is unfinished; resume it with"):
        publish(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loop_without_promotion_is_refused(tmp_path: Path) -> None:
    loop(tmp_path, GateVerdict.PROMOTE, GateVerdict.UNDECIDED)
    with pytest.raises(DiscoveryError, match="the gate says undecided against cmc"):
        publish(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_everything_published_can_be_read_back(tmp_path: Path) -> None:
    progress = loop(tmp_path / "loop", GateVerdict.PROMOTE, GateVerdict.PROMOTE)
    folder, to = progress.folder, tmp_path / "out"
    (folder / f"{NAME}.py").write_text(SOURCE)
    (folder / f"{NAME}.json").write_text(json.dumps({"name": NAME, "search": {"afs": 60.0}}))
    (folder / "frontier.svg").write_text("<svg/>")
    with (folder / "recordings.jsonl").open("w") as file:
        for number in range(8 + HELD_OUT):
            branches = [{"probes": ["7"], "tokens": 40, "final": "7", "probe_tokens": [9]} for _ in range(4)]
            about = {"model": "m", "benchmark": "b", "interval": 32, "reference": "7"}
            split = "search" if number < 8 else "held-out"
            file.write(json.dumps({"id": f"{number:064x}", "branches": branches, "split": split, **about}) + "\n")
    files = publish(folder, to)
    assert [file.name for file in files] == [
        *("calibration.json", "champion.json", "champion.py", "frontier.json", "frontier.svg", "recordings.jsonl.xz")
    ]
    assert read(to / "champion.py").source == SOURCE
    card = json.loads((to / "champion.json").read_text())
    assert [judgement["verdict"] for judgement in card["gate"]] == ["promote", "promote"]
    assert json.loads((to / "frontier.json").read_text())["questions"] == asdict(progress.plan)["held_out_questions"]
    assert json.loads((to / "calibration.json").read_text())
    unpacked = tmp_path / "unpacked.jsonl"
    unpacked.write_bytes(lzma.decompress((to / "recordings.jsonl.xz").read_bytes()))
    recordings = read_jsonl(unpacked)
    assert len(recordings) == QUESTIONS
    assert {recording.split for recording in recordings} == {"held-out"}
