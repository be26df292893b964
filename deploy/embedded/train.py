"""Train the embedded model from scratch and write it to `deploy/embedded/model/`.

    python -m deploy.embedded.train                 # the committed model
    python -m deploy.embedded.train --minutes 3     # a quick, less accurate one

One CPU thread is enough. The same seed and number of steps give the same examples in the same order.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.embedded import mends

MODEL = Path(__file__).with_name("model")
STEPS = 1850


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m deploy.embedded.train", description=summary)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--minutes", type=float, help="train for this many minutes instead of --steps; not reproducible"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL)
    arguments = parser.parse_args(argv)

    # Both must come before torch is first imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    mends.apply()
    from deploy.embedded.trainer import Budget, train, write

    budget = Budget(arguments.steps, arguments.minutes, time.monotonic())
    model, fast = train(budget, arguments.seed)
    write(model, fast, arguments.out)
    print(f"wrote {arguments.out} after {budget.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
