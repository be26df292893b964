"""Genomes of the grammar explorer: the components of a policy and its numbers, each a function of β.

A genome names one component for each part of a policy. It gives each number that the components need as (lo, hi, g);
the number is then lo + (hi - lo)·β^g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

Genome = Mapping[str, Any]

GENTLE, STEEP = 0.3, 3.0
"""Bounds of the exponent of β."""


class Knob(NamedTuple):
    """A number of a policy and its range."""

    name: str
    comment: str  # written beside it in the controller file
    low: float
    high: float
    is_integer: bool = False
    log: bool = False  # drawn on a logarithmic scale
    falls: bool = False  # decreases with β, because smaller values spend more

    def span(self, genome: Genome) -> tuple[float, float, float]:
        """Return the value at β = 0, the value at β = 1, and the exponent between them."""
        ends = sorted((genome[f"{self.name}.lo"], genome[f"{self.name}.hi"]), reverse=self.falls)
        return ends[0], ends[1], genome[f"{self.name}.g"]


FIRST = Knob("first", "chains opened at once", 1, 64, is_integer=True, log=True)
MOST = Knob("most", "chains that may be opened at all", 1, 64, is_integer=True, log=True)
ENOUGH = Knob("enough", "chains that have ended that settle it whatever they say", 1, 64, is_integer=True, log=True)
LEAST = Knob("least", "finished chains before it may stop", 1, 12, is_integer=True, log=True)
SURE = Knob("sure", "confidence that the leader leads, to stop at", 0.5, 0.9995)
SHARE = Knob("share", "share of the votes the leader needs to stop", 0.4, 1.0)
LEAD = Knob("lead", "by how many standard deviations the leader must lead to stop", 0.3, 4.0)
STRETCH = Knob("stretch", "times the length of the finished at which it is given up", 1.0, 4.0)
PATIENCE = Knob(
    "patience", "looks in a row at which a chain may differ from the leader", 2, 20, is_integer=True, log=True
)
RUNNING = Knob("running", "chains kept running while it is not sure", 1, 32, is_integer=True, log=True)
WAVE = Knob("wave", "chains opened when those before have not settled it", 1, 24, is_integer=True, log=True)
SHORTER = Knob("shorter", "power by which a shorter chain's vote counts more", 0.0, 4.0)
VOICE = Knob("voice", "weight of what a running chain says beside a finished vote", 0.0, 1.0)

HORIZON = Knob("horizon", "intervals a chain may run", 4, 100, is_integer=True, log=True)

PARTS: Final[Mapping[str, Mapping[str, Sequence[Knob]]]] = {
    "widen": {"none": (), "refill": (RUNNING,), "wave": (WAVE,)},
    "stop": {"confidence": (SURE,), "share": (SHARE,), "lead": (LEAD,)},
    "prune": {"off": (), "long": (STRETCH,), "deviant": (PATIENCE,)},
    "weight": {"plain": (), "short": (SHORTER,)},
    "pool": {"finished": (), "all": (VOICE,)},
    "depth": {"whole": (), "horizon": (HORIZON,)},
    "pace": {"uniform": (), "lead": ()},
}
"""Parts of a policy, their components, and the numbers each component needs."""
ALWAYS: Final = (FIRST, MOST, ENOUGH, LEAST)
"""Numbers that every policy needs."""


def knobs(genome: Genome) -> list[Knob]:
    """Return the numbers a genome needs."""
    chosen = [knob for part, components in PARTS.items() for knob in components[genome[part]]]
    return [*ALWAYS, *chosen]


def probes_running(genome: Genome) -> bool:
    """Return whether running chains are probed."""
    return bool(genome["pool"] == "all" or genome["prune"] == "deviant" or genome["pace"] == "lead")


def has_horizon(genome: Genome) -> bool:
    """Return whether chains may be stopped before their end without being pruned."""
    return bool(genome["depth"] == "horizon")


def space(genome: Genome) -> dict[str, BaseDistribution]:
    """Return the distributions of a genome's components and numbers, by name."""
    distributions: dict[str, BaseDistribution] = {
        part: CategoricalDistribution(list(names)) for part, names in PARTS.items()
    }
    for knob in knobs(genome):
        for end in ("lo", "hi"):
            distributions[f"{knob.name}.{end}"] = FloatDistribution(knob.low, knob.high, log=knob.log)
        distributions[f"{knob.name}.g"] = FloatDistribution(GENTLE, STEEP, log=True)
    return distributions


def genome_of(parts: Mapping[str, str], **spans: tuple[float, float, float]) -> dict[str, Any]:
    """Return a genome of these components; numbers that are not given are in the middle of their ranges at every β."""
    genome: dict[str, Any] = {part: parts.get(part, next(iter(names))) for part, names in PARTS.items()}
    for knob in knobs(genome):
        middle = math.sqrt(knob.low * knob.high) if knob.log else (knob.low + knob.high) / 2
        low, high, g = spans.get(knob.name, (middle, middle, 1.0))
        genome |= {f"{knob.name}.lo": low, f"{knob.name}.hi": high, f"{knob.name}.g": g}
    return genome


CLASSICS: Final[Sequence[Genome]] = (
    # shortest first: open many chains, vote on those that finish first
    genome_of({}, first=(1, 64, 2), most=(64, 64, 1), enough=(1, 16, 2), least=(2, 8, 1), sure=(0.95, 0.999, 1)),
    # shortest first, pruning chains that keep disagreeing with the leader
    genome_of(
        {"stop": "lead", "prune": "deviant"},
        **{"first": (1, 64, 3), "most": (64, 64, 1), "enough": (1, 32, 2.5), "least": (2, 8, 1)},
        **{"lead": (1.2, 2.5, 1), "patience": (4, 16, 1)},
    ),
    # sequential until the confidence is high enough
    genome_of(
        {"widen": "refill"},
        **{"first": (1, 4, 1), "most": (1, 64, 1), "enough": (1, 64, 1), "least": (2, 4, 1)},
        **{"running": (1, 8, 1), "sure": (0.9, 0.99, 1)},
    ),
    # in waves, with more weight for shorter chains
    genome_of(
        {"widen": "wave", "weight": "short", "stop": "lead"},
        **{"first": (1, 8, 1), "most": (1, 64, 1), "enough": (1, 64, 1), "least": (2, 4, 1)},
        **{"wave": (1, 16, 1), "lead": (1, 2.5, 1), "shorter": (1, 1, 1)},
    ),
    # limits the length of chains
    genome_of(
        {"depth": "horizon", "prune": "deviant"},
        **{"first": (1, 64, 3), "most": (64, 64, 1), "enough": (1, 32, 2.5), "least": (2, 8, 1)},
        **{"sure": (0.9, 0.999, 1), "patience": (4, 16, 1), "horizon": (30, 90, 1)},
    ),
)
"""First genomes of every search, which are known to do well."""
