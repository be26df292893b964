"""The summary of a loop says what its predicted intervals promise, which earlier versions predicted one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxy.commands.loop.progress import LoopPlan, LoopProgress
from proxy.commands.loop.report import summarise
from proxy.commands.loop.stages import LoopStages

NAMES = [f"{figure} {what}" for figure in ("accuracy", "tokens") for what in ("before", "after", "gained", "added")]


@pytest.mark.parametrize(
    ("jointly", "promise"),
    [
        ({"predicted_jointly": True}, "With 95 % confidence, all 6 predicted intervals hold at once."),
        ({}, "Each of the 6 predicted intervals holds with 95 % confidence, but not all at once."),
    ],
)
def test_the_summary_tells_joint_intervals_from_those_of_earlier_versions(
    tmp_path: Path, jointly: dict[str, Any], promise: str
) -> None:
    progress = LoopProgress.open(tmp_path / "loop", LoopPlan())
    live = {"accuracy": [50.0, 40.0, 60.0], "tokens": [90.0, 80.0, 100.0]}
    results: dict[str, dict[str, Any]] = {
        "discover": {"name": "found", "candidates": 9},
        "measure": {
            "self_consistency": {"accuracy": 60.0, "tokens": 100.0},
            "tokens_at_its_accuracy": {"found": 70.0},
            "predictions": {name: [0.0, -9.0, 99.0] for name in NAMES},
            **jointly,
        },
        "before": live,
        "rollout": {"promoted": True, **live},
        "rollback": {"rolled_back": True, "serving": ["cmc"]},
    }
    progress.save("gate", [])
    for stage, result in results.items():
        progress.save(stage, result)
    lines = summarise(LoopStages(LoopProgress.open(tmp_path / "loop", LoopPlan()), lambda _: None))
    assert [line for line in lines if "predicted intervals" in line] == [promise]
    assert sum("(inside)" in line for line in lines) == 6
