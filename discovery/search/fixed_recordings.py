"""Made-up recordings on which the behaviour of candidates is compared."""

from __future__ import annotations

from typing import Final

import numpy as np

from discovery.data.recordings import Cell, RecordedBranch, RecordedQuestion, Recording, Split, intern_answers

PROBES: Final = Cell("fingerprint", "fixed", Split.SEARCH)
"""Cell of synthetic recordings on which behaviour is compared."""


def fixed_recordings() -> dict[Cell, list[Recording]]:
    """Return made-up recordings with signals, on which different controllers are likely to behave differently."""
    return {PROBES: [intern_answers(_question(number)) for number in range(8)]}


def _question(number: int) -> RecordedQuestion:
    rng, doubts = np.random.default_rng(number), np.random.default_rng(1000 + number)
    branches = []
    for _ in range(64):
        length = int(rng.gamma(4, 2000)) + 300
        final = "7" if rng.random() < 0.2 + 0.08 * number else str(rng.integers(0, 5))
        probes = [final if rng.random() < at / 12 else str(rng.integers(0, 9)) for at in range(length // 500)]
        sure = [int(value) for value in doubts.integers(500, 1000, len(probes) + 1)]
        signals = sure, [value * 9 // 10 for value in sure], [1000 - value for value in sure[1:]]
        branches.append(RecordedBranch(probes, length, final, [20] * len(probes), True, *signals))
    return RecordedQuestion(f"{number:064d}", *PROBES[:2], 500, branches, "7")
