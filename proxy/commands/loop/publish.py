"""Publish what a loop found: the controller, its card and gate reports, its calibration, the frontier, some recordings.

    python -m proxy.commands.loop.publish LOOP FOLDER

`deploy/embedded/champion/` was written by this command.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Split
from discovery.errors import DiscoveryError
from discovery.promotion.verdict import GateVerdict
from proxy.commands.loop.progress import FILE, LoopPlan, LoopProgress
from proxy.commands.loop.stages import CHAMPIONS, LoopStages

QUESTIONS: Final = 24
"""Held-out questions whose branches are published."""
CALIBRATION_SHUFFLES: Final = 10


def publish(folder: Path, to: Path) -> list[Path]:
    """Write the outcome of the loop in `folder` into `to` and return the files.

    Raises DiscoveryError if the loop is unfinished or promoted nothing.
    """
    stages = _finished_loop(folder)
    to.mkdir(parents=True, exist_ok=True)
    source = stages.finalist
    shutil.copyfile(source, to / "champion.py")
    card = json.loads(source.with_suffix(".json").read_bytes())
    card["gate"] = stages.progress.get("gate")
    _write_json(to / "champion.json", card)
    measured = stages.progress.get("measure")
    frontier = {name: measured[name] for name in ("points", "self_consistency", "tokens_at_its_accuracy")}
    _write_json(to / "frontier.json", {"questions": stages.plan.held_out_questions, **frontier})
    shutil.copyfile(folder / "frontier.svg", to / "frontier.svg")
    with lzma.open(to / "recordings.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(_recorded(stages))
    calibrate = ["calibrate", "--recordings", str(stages.recordings), "--out", str(to / "calibration.json")]
    compared = [
        "--controllers",
        ",".join((*CHAMPIONS, str(to / "champion.py"))),
        "--shuffles",
        str(CALIBRATION_SHUFFLES),
    ]
    subprocess.run([sys.executable, "-m", "proxy.cli", *calibrate, *compared], check=True)
    return sorted(to.iterdir())


def _finished_loop(folder: Path) -> LoopStages:
    path = folder / FILE
    if not path.exists():
        raise DiscoveryError(f"{path}: no such file; name the folder of a loop")
    plan = LoopPlan(**json.loads(path.read_bytes())["plan"])
    stages = LoopStages(LoopProgress.open(folder, plan), lambda line: None)
    if stages.progress.get("measure") is None:
        raise DiscoveryError(f"{folder}: the loop is unfinished; resume it with `autotts loop --folder {folder}`")
    for champion, report in zip(CHAMPIONS, stages.verdicts(), strict=True):
        if report.verdict is not GateVerdict.PROMOTE:
            raise DiscoveryError(f"{folder}: the gate says {report.verdict} against {champion}; nothing to publish")
    return stages


def _recorded(stages: LoopStages) -> Iterator[str]:
    """Yield the lines of the first held-out questions, sorted by question."""
    by_question: dict[str, list[str]] = {}
    with stages.recordings.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record["split"] == Split.HELD_OUT:
                by_question.setdefault(record["id"], []).append(line)
    for question in islice(sorted(by_question), QUESTIONS):
        yield from by_question[question]


def _write_json(path: Path, data: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def main() -> int:
    """Publish the loop that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m proxy.commands.loop.publish")
    parser.add_argument("loop", type=Path, help="folder of a loop that promoted its finalist")
    parser.add_argument("folder", type=Path, help="folder to write to")
    options = parser.parse_args()
    try:
        files = publish(options.loop, options.folder)
    except DiscoveryError as error:
        print(f"publish: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(*files, sep="\n")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
