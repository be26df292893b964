"""Progress of a loop: which stages are done and what they found, kept in a file so that a loop can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from discovery.data.atomic_files import atomic_write
from discovery.data.safe_json import parse_json
from discovery.errors import DiscoveryError

FILE: Final = "loop.json"
AFTER_VERDICT: Final = ("rollout", "rollback")
"""Stages that `force` changes."""


@dataclass(frozen=True)
class LoopPlan:
    """Size of a loop. A loop that is resumed must have the same plan."""

    search_questions: int = 200
    held_out_questions: int = 300
    branches: int = 48  # recorded per question
    minutes: float = 8.0  # of search
    latency: float = 0.5  # points subtracted per doubling of the critical path
    shuffles: int = 20  # branch orders in the gate
    requests: int = 200  # fresh questions asked before and after the promotion
    beta: float = 0.5  # of the fresh requests, and the deployed β of the gate
    seed: int = 0
    force: bool = False  # roll out whatever the gate's verdict is; may differ when a loop is resumed


class LoopProgress:
    """Results of the stages that are done, by stage. Every change is written to the file at once."""

    def __init__(self, folder: Path, plan: LoopPlan, results: Mapping[str, Any]) -> None:
        self.folder = folder
        self.plan = plan
        self._results = dict(results)

    @classmethod
    def open(cls, folder: Path, plan: LoopPlan) -> LoopProgress:
        """Open the loop in a folder, or begin one. Raises DiscoveryError if the loop there has another plan.

        A loop that ended without a rollout is rolled out if the plan now says `force`.
        """
        path = folder / FILE
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder, plan, {})
        try:
            data = parse_json(path.read_bytes())
            earlier, results = dict(data["plan"]), dict(data["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise DiscoveryError(f"{path}: not the state of a loop ({error}); name another --folder") from None
        differing = [name for name, value in asdict(plan).items() if name != "force" and earlier.get(name) != value]
        if differing:
            changes = ", ".join(f"{name} was {earlier.get(name)}" for name in differing)
            raise DiscoveryError(f"{folder} holds a loop of another size ({changes}); name another --folder")
        rollout = results.get("rollout")
        if plan.force and rollout is not None and not rollout.get("promoted"):
            results = {stage: result for stage, result in results.items() if stage not in AFTER_VERDICT}
        return cls(folder, plan, results)

    def get(self, stage: str) -> Any:
        """Return the result of a stage; None if it is not done."""
        return self._results.get(stage)

    def save(self, stage: str, result: Any) -> None:
        """Record that a stage is done. Raises FileWriteError."""
        self._results[stage] = result
        data = {"plan": asdict(self.plan), "results": self._results}
        with atomic_write(self.folder / FILE) as file:
            file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
