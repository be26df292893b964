"""Run the soak and print its report: `python -m tests.soak --minutes 30`. The status is 1 if anything was wrong."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from tests.soak.run import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Mixed traffic under disturbances.")
    parser.add_argument(
        "--minutes", type=float, default=30, help="minutes of traffic, calm times included (default 30)"
    )
    parser.add_argument("--clients", type=int, default=6, help="clients that ask at once (default 6)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all choices (default 1)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report = asyncio.run(
            soak(Path(folder), 60 * arguments.minutes, arguments.clients, random.Random(arguments.seed))
        )
    sys.stdout.write(report.text())
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
