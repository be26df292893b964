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

    def terms(self, genome: Genome) -> tuple[float, float, float]:
        """Return the numbers of the formula `start + change · β^g`, rounded as a controller file has them."""
        start, end, g = self.span(genome)
        start, end = float(f"{start:.4g}"), float(f"{end:.4g}")  # rounded first, so that the sum stays in bounds
        return start, math.copysign(float(f"{abs(end - start):.4g}"), end - start), float(f"{g:.3g}")

    def value(self, genome: Genome, beta: float) -> float:
        """Return the number at `beta`, to the bit as a controller file computes it."""
        start, change, g = self.terms(genome)
        number: float = start + change * beta**g
        return round(number) if self.is_integer else number


def _count(name: str, comment: str, low: int, high: int) -> Knob:
    """Return a knob with whole values, drawn on a logarithmic scale."""
    return Knob(name, comment, low, high, is_integer=True, log=True)


FIRST = _count("first", "chains opened in the first round", 1, 64)
MOST = _count("most", "largest number of chains", 1, 64)
ENOUGH = _count("enough", "ended chains at which it always stops", 1, 64)
LEAST = _count("least", "finished chains needed before it may stop early", 1, 12)

RUNNING = _count("running", "chains kept running at the same time", 1, 32)
WAVE = _count("wave", "chains opened in each later wave", 1, 24)
GROWTH = Knob("growth", "size of the next wave, relative to all chains so far", 0.25, 4.0, log=True)

SURE = Knob("sure", "probability that the leader is ahead, to stop at", 0.5, 0.9995)
SHARE = Knob("share", "share of all votes that the leader needs to stop", 0.4, 1.0)
LEAD = Knob("lead", "standard deviations of the leader's lead, to stop at", 0.3, 4.0)
MARGIN = Knob("margin", "difference of the two largest vote shares, to stop at", 0.05, 0.95)
FACTOR = Knob("factor", "Bayes factor for the leader, to stop at", 1.0, 1000.0, log=True)
ERROR = Knob("error", "allowed probability of a wrong certificate", 0.02, 0.9, log=True, falls=True)
WORTH = Knob("worth", "expected gain in vote share below which it stops", 0.001, 0.1, log=True, falls=True)

STRETCH = Knob("stretch", "length, relative to the median, at which a chain is pruned", 1.0, 4.0)
PATIENCE = _count("patience", "probes in a row unlike the leader at which it is pruned", 2, 20)
FLIPS = _count("flips", "answer changes, less repetitions, at which it is pruned", 1, 10)
TRUST = Knob("trust", "confidence, relative to the leader's, to prune below", 0.6, 1.0, falls=True)
FLOOR = Knob("floor", "quantile of lowest windows below which a chain is pruned", 0.0, 0.8, falls=True)

POWER = Knob("power", "power of a chain's length in its weight", -4.0, 4.0)
SCALE = Knob("scale", "nats of log-probability that change a weight e-fold", 0.5, 200.0, log=True)
STRENGTH = Knob("strength", "power of a chain's mean token probability in its weight", 0.5, 100.0, log=True)
BELIEF = Knob("belief", "power of its latest probe's probability in a weight", 0.1, 10.0, log=True)

KEPT = Knob("kept", "share of the finished chains that vote, by confidence", 0.2, 1.0)
VOICE = Knob("voice", "weight of a running chain's probe beside a finished chain", 0.0, 1.0)
HORIZON = _count("horizon", "largest number of intervals of a chain", 4, 100)

Parts = Mapping[str, Mapping[str, Sequence[Knob]]]
"""Components and the numbers each needs, by part of a policy."""

PARTS: Final[Parts] = {
    "widen": {"none": (), "refill": (RUNNING,), "wave": (WAVE,), "growing": (GROWTH,)},
    "stop": {
        "confidence": (SURE,),
        "share": (SHARE,),
        "lead": (LEAD,),
        "margin": (MARGIN,),
        "bayes": (FACTOR,),
        "certified": (ERROR,),
        "gain": (WORTH,),
    },
    "prune": {
        "off": (),
        "long": (STRETCH,),
        "deviant": (PATIENCE,),
        "unstable": (FLIPS,),
        "doubtful": (TRUST,),
        "weak": (FLOOR,),
    },
    "weight": {
        "plain": (),
        "length": (POWER,),
        "likelihood": (SCALE,),
        "confidence": (STRENGTH,),
        "length and confidence": (POWER, STRENGTH),
        "probe": (BELIEF,),
    },
    "filter": {"off": (), "confident": (KEPT,)},
    "pool": {"finished": (), "all": (VOICE,)},
    "depth": {"whole": (), "horizon": (HORIZON,)},
    "pace": {"uniform": (), "lead": ()},
}
"""Parts of a policy, their components, and the numbers each component needs."""
ALWAYS: Final = (FIRST, MOST, ENOUGH, LEAST)
"""Numbers that every policy needs."""


_PROBING: Final[Mapping[str, Sequence[str]]] = {
    "pool": ("all",),
    "prune": ("deviant", "unstable"),
    "pace": ("lead",),
    "weight": ("probe",),
}
"""Components that read probes of running chains, by part."""
PARTS_WITHOUT_PROBES: Final[Parts] = {
    part: {
        name: numbers
        for name, numbers in components.items()
        if name not in _PROBING.get(part, ()) and (part, name) != ("depth", "horizon")  # which probes at the end
    }
    for part, components in PARTS.items()
}
"""PARTS for episodes whose branches cannot be probed."""


def knobs(genome: Genome) -> list[Knob]:
    """Return the numbers a genome needs."""
    chosen = [knob for part, components in PARTS.items() for knob in components[genome[part]]]
    return [*ALWAYS, *chosen]


def probes_running(genome: Genome) -> bool:
    """Return whether running chains are probed."""
    return any(genome[part] in components for part, components in _PROBING.items())


def may_probe(genome: Genome) -> bool:
    """Return whether a genome's controller may probe at all."""
    return any(genome[part] not in components for part, components in PARTS_WITHOUT_PROBES.items())


def reads_intervals(genome: Genome) -> bool:
    """Return whether the confidence of generated tokens is read."""
    weights = ("likelihood", "confidence", "length and confidence")
    readers = {"weight": weights, "filter": ("confident",), "prune": ("doubtful", "weak")}
    return any(genome[part] in components for part, components in readers.items())


def signals_of(genome: Genome) -> list[str]:
    """Return the names of the signals that a genome's controller declares."""
    return ["intervals"] * reads_intervals(genome) + ["probes"] * (genome["weight"] == "probe")


def has_horizon(genome: Genome) -> bool:
    """Return whether chains may be stopped before their end without being pruned."""
    return bool(genome["depth"] == "horizon")


def has_whole_votes(genome: Genome) -> bool:
    """Return whether votes are whole numbers."""
    return bool(genome["weight"] == "plain" and genome["filter"] == "off" and genome["pool"] == "finished")


def space(genome: Genome, parts: Parts = PARTS) -> dict[str, BaseDistribution]:
    """Return the distributions of components and numbers by name. `parts` has the components to choose from."""
    distributions: dict[str, BaseDistribution] = {
        part: CategoricalDistribution(list(names)) for part, names in parts.items()
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
