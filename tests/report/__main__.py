"""Measure everything that the report shows, and write `docs/report.md` with its pictures.

    python -m tests.report [--only SECTION,…] [--minutes 5] [--peers] [--fresh] [--render]

Each section runs one command of this project. Results are kept in `build/report`, so that an interrupted run goes on
where it stopped; a result is measured again if the code has changed, or with `--fresh`. `--render` only writes the page
again. `--minutes` is the length of the soak test. `--peers` also measures other proxies.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.readability import ROOT
from tests.report.document import page
from tests.report.measuring import code_digest, measure, read_result
from tests.report.sections import sections

FOLDER: Final = ROOT / "build" / "report"
PAGE: Final = ROOT / "docs" / "report.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write. Return 1 if a section failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.report", description="Measure everything and write the report."
    )
    parser.add_argument("--only", default="", metavar="SECTION,…", help="measure only these sections")
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the soak test (default: 5)")
    parser.add_argument("--peers", action="store_true", help="also measure other proxies")
    parser.add_argument("--fresh", action="store_true", help="measure again what has been measured")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the page from what is kept")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results are kept")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    given = parser.parse_args(arguments)
    listed = sections(given.minutes, given.peers)
    names = [name for name in given.only.split(",") if name]
    if unknown := set(names) - {section.name for section in listed}:
        known = ", ".join(section.name for section in listed)
        parser.error(f"--only: unknown section {', '.join(sorted(unknown))}; use {known}")
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    code = code_digest()
    measured_code = folder / "code.txt"
    if not given.render and (given.fresh or not measured_code.exists() or measured_code.read_text() != code):
        shutil.rmtree(folder / "loop", ignore_errors=True)  # a loop of other code is not continued
        measured_code.write_text(code)
    for section in listed:
        if given.render or (names and section.name not in names):
            continue
        if given.fresh:
            (folder / f"{section.name}.json").unlink(missing_ok=True)
        measure(section, folder, code)
    kept = {section.name: read_result(folder / f"{section.name}.json") for section in listed}
    results = {name: result for name, result in kept.items() if result is not None}
    pictures = {}
    for section in listed:
        drawn = folder / section.picture
        if section.picture and drawn.is_file():
            target = given.page.parent / "images" / f"report-{section.name}.svg"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(drawn, target)
            pictures[section.name] = f"images/{target.name}"
    given.page.write_text(page(listed, results, pictures), "utf-8")
    sys.stderr.write(f"written: {given.page}\n")
    return 1 if any(result.status for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
