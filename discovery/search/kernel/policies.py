"""Genomes as records for the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Final

import numpy as np

from controllers.baselines.adaptive_consistency import LEAST, AdaptiveWaves
from controllers.dial import MOST_CHAINS
from controllers.voting import STEEPEST
from discovery.search.explorers.controller_writer import is_counted, repeats_rounds
from discovery.search.explorers.genome import PARTS, Genome, knobs, probes_running, reads_intervals
from discovery.search.kernel import records
from discovery.search.kernel.records import POLICY, WAVES, Records

COMPONENTS: Final[Mapping[str, Mapping[str, int]]] = {
    "widen": {
        "none": records.ALL_AT_ONCE,
        "refill": records.REFILL,
        "wave": records.WAVE,
        "growing": records.GROWING,
    },
    "stop": {
        "confidence": records.CONFIDENCE,
        "share": records.SHARE,
        "lead": records.LEAD,
        "margin": records.MARGIN,
        "bayes": records.BAYES,
        "certified": records.CERTIFIED,
        "gain": records.GAIN,
    },
    "prune": {
        "off": records.NO_PRUNING,
        "long": records.LONG,
        "deviant": records.DEVIANT,
        "unstable": records.UNSTABLE,
        "doubtful": records.DOUBTFUL,
        "weak": records.WEAK,
    },
    "weight": {
        "plain": records.PLAIN,
        "length": records.LENGTH,
        "likelihood": records.LIKELIHOOD,
        "confidence": records.TOKEN_CONFIDENCE,
        "length and confidence": records.LENGTH_AND_CONFIDENCE,
        "probe": records.PROBE_CONFIDENCE,
    },
    "filter": {"off": 0, "confident": 1},
    "pool": {"finished": 0, "all": 1},
    "depth": {"whole": 0, "horizon": 1},
    "pace": {"uniform": 0, "lead": 1},
}
"""Components that the kernel plays. Genomes with others are left to the Python runner."""


def is_playable(genome: Genome) -> bool:
    """Return whether the kernel has every component and knob of a genome."""
    return (
        COMPONENTS.keys() == PARTS.keys()
        and all(genome.get(part) in codes for part, codes in COMPONENTS.items())
        and all(knob.name in (POLICY.names or ()) for knob in knobs(genome))
    )


def policy_records(genome: Genome, betas: Sequence[float]) -> Records:
    """Return a playable genome at each β, with the numbers that its controller file computes.

    Raises ValueError if it may open more chains than the kernel has room for.
    """
    policies = np.zeros(len(betas), POLICY)
    for part, codes in COMPONENTS.items():
        policies[part] = codes[genome[part]]
    for fact in (probes_running, reads_intervals, repeats_rounds, is_counted):
        policies[fact.__name__] = fact(genome)
    policies["half"], policies["steepest"] = 0.5, STEEPEST
    for knob in knobs(genome):
        policies[knob.name] = [knob.value(genome, beta) for beta in betas]
    if (policies["most"] > MOST_CHAINS).any():
        raise ValueError(f"most = {policies['most'].max()}: the kernel has room for {MOST_CHAINS} chains")
    if genome["prune"] == "doubtful":
        policies["log_trust"] = [log(trust) for trust in policies["trust"].tolist()]
    return policies


def wave_records(betas: Sequence[float]) -> Records:
    """Return the numbers of `adaptive_consistency` at each β."""
    waves = np.zeros(len(betas), WAVES)
    for record, beta in zip(waves, betas, strict=True):
        controller = AdaptiveWaves(beta)
        record["least"] = LEAST
        record["samples"], record["first"], record["worth"] = (
            controller.samples,
            controller.first_wave,
            controller.worth,
        )
    return waves
