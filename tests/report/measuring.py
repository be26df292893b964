"""Run the sections' commands, and keep their output until the code changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Final

from discovery.data.atomic_files import atomic_write
from tests.bench.rows import Row
from tests.readability import PACKAGES, ROOT
from tests.report.sections import Section

MEASURED: Final = ("tests/bench", "tests/faults", "tests/soak")
"""Folders of tests whose programs the sections run."""
STOP_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class SectionResult:
    """Output, rows and exit status of one section's command."""

    name: str
    code: str  # digest of the code that was measured
    day: str
    seconds: float
    status: int  # exit status; negative: the number of the signal that ended it
    text: str
    rows: list[Row]


def code_digest() -> str:
    """Return a hash of all code that the sections run, and of the pinned versions."""
    digest = sha256((ROOT / "constraints.txt").read_bytes())
    for folder in (*PACKAGES, *MEASURED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def measure(section: Section, folder: Path, code: str) -> SectionResult:
    """Run a section's command and save its result. A result of the same code that ended well is used again."""
    saved = folder / f"{section.name}.json"
    if (earlier := read_result(saved)) is not None and earlier.code == code and earlier.status == 0:
        sys.stderr.write(f"{section.name}: measured before\n")
        return earlier
    rows_file = folder / f"{section.name}.rows.json"
    rows_file.unlink(missing_ok=True)
    sys.stderr.write(f"{section.name}: {section.shown}\n")
    began = time.monotonic()
    status, text = _run(section, folder)
    if section.summary is not None and status == 0:
        text += section.summary(folder)
    rows = [Row(*row) for row in json.loads(rows_file.read_text())] if rows_file.exists() else []
    result = SectionResult(
        section.name, code, date.today().isoformat(), round(time.monotonic() - began, 1), status, text, rows
    )
    with atomic_write(saved) as file:
        file.write(json.dumps(asdict(result), indent=1, ensure_ascii=False).encode())
    sys.stderr.write(f"{section.name}: status {status} after {result.seconds:.0f} s\n")
    return result


def read_result(path: Path) -> SectionResult | None:
    """Return a saved result, or None if there is none that can be read."""
    try:
        fields = json.loads(path.read_bytes())
        return SectionResult(**{**fields, "rows": [Row(*row) for row in fields["rows"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _run(section: Section, folder: Path) -> tuple[int, str]:
    """Run a command in a process group of its own, and return its exit status and what it printed."""
    environment = {**os.environ, "COLUMNS": "130", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        list(section.command(folder)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            text, complaint = process.communicate(timeout=section.timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                text, complaint = process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                text, complaint = process.communicate()
            return -signal.SIGTERM, text
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        sys.stderr.write(complaint[-2000:])
    return process.returncode, text
