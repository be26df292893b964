"""First genomes of every search: policies that are known to do well, written in the grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from discovery.search.explorers.genome import Genome, genome_of


def _waves(parts: dict[str, str], **spans: tuple[float, float, float]) -> dict[str, Any]:
    """Return a genome that samples in doubling waves while more chains are worth their tokens."""
    numbers = {"first": (1, 8, 1), "most": (1, 64, 1), "enough": (64, 64, 1), "least": (2, 2, 1), "growth": (1, 1, 1)}
    return genome_of({"widen": "growing", "stop": "gain", **parts}, worth=(0.014, 0.05, 1), **{**numbers, **spans})


CLASSICS: Final[Sequence[Genome]] = (
    # adaptive consistency: doubling waves, whose votes count equally
    _waves({}),
    # adaptive consistency, votes weighted by log-probability
    _waves({"weight": "likelihood"}, scale=(8, 8, 1)),
    # adaptive consistency that counts long chains more, or short ones, or the long and confident ones
    _waves({"weight": "length"}, power=(1, 1, 1)),
    _waves({"weight": "length"}, power=(-1, -1, 1)),
    _waves({"weight": "length and confidence"}, power=(1, 1, 1), strength=(20, 20, 1)),
    # votes weighted by log-probability, and chains with a less confident window than most are pruned
    _waves({"weight": "likelihood", "prune": "weak"}, scale=(8, 8, 1), floor=(0.1, 0.4, 1), least=(2, 6, 1)),
    # many chains at once, weighted by mean probability; chains much less confident than the leader's are pruned
    genome_of(
        {"weight": "confidence", "prune": "doubtful", "stop": "lead"},
        **{"first": (1, 64, 2), "most": (64, 64, 1), "enough": (1, 64, 2), "least": (2, 8, 1)},
        **{"strength": (8, 8, 1), "trust": (0.85, 0.95, 1), "lead": (1.2, 2.5, 1)},
    ),
    # shortest first: open many chains, vote on those that finish first
    genome_of({}, first=(1, 64, 2), most=(64, 64, 1), enough=(1, 16, 2), least=(2, 8, 1), sure=(0.95, 0.999, 1)),
    # shortest first, pruning chains that keep disagreeing with the leader
    genome_of(
        {"stop": "lead", "prune": "deviant"},
        **{"first": (1, 64, 3), "most": (64, 64, 1), "enough": (1, 32, 2.5), "least": (2, 8, 1)},
        **{"lead": (1.2, 2.5, 1), "patience": (4, 16, 1)},
    ),
    # sequential until the Bayes factor is high enough
    genome_of(
        {"widen": "refill", "stop": "bayes"},
        **{"first": (1, 4, 1), "most": (1, 64, 1), "enough": (1, 64, 1), "least": (2, 4, 1)},
        **{"running": (1, 8, 1), "factor": (5, 50, 1)},
    ),
    # running chains vote by their probes; those that keep changing their answers are pruned
    genome_of(
        {"pool": "all", "prune": "unstable", "stop": "lead"},
        **{"first": (1, 64, 2), "most": (64, 64, 1), "enough": (1, 64, 2), "least": (1, 4, 1)},
        **{"voice": (0.5, 0.5, 1), "flips": (3, 6, 1), "lead": (1.2, 3, 1)},
    ),
    # limits the length of chains
    genome_of(
        {"depth": "horizon", "prune": "deviant"},
        **{"first": (1, 64, 3), "most": (64, 64, 1), "enough": (1, 32, 2.5), "least": (2, 8, 1)},
        **{"sure": (0.9, 0.999, 1), "patience": (4, 16, 1), "horizon": (30, 90, 1)},
    ),
)
