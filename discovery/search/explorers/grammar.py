"""Explorer without a model: policies put together from components, every number a monotonic function of β.

Structures and numbers are drawn by optuna's tree-structured Parzen estimator from the results of earlier genomes. In
between, CMA-ES refines the numbers of the best genome. Both are rebuilt from the history at every step, with the step's
own seed, so that a resumed run continues as it would have.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from discovery.search.explorers import Candidate, ExplorerContext, ScoredCandidate
from discovery.search.explorers.classics import CLASSICS
from discovery.search.explorers.controller_writer import emit
from discovery.search.explorers.evolution import next_generation, ratings
from discovery.search.explorers.genome import PARTS, PARTS_WITHOUT_PROBES, Genome, Parts, may_probe, space

SIGMA: Final = 0.12
"""Standard deviation of a lineage's first generation, as a fraction of a number's range."""
CHANGED: Final = 0.3
"""Share of the numbers that are changed when a genome is varied."""
PARENTS: Final = 16
"""Number of best genomes that are varied."""
MOST_FITTED: Final = 200
"""Most results to which the estimator is fitted if many candidates are tried."""
REFINED_EVERY: Final = 3
"""Every n-th step draws new structures; the others refine the numbers of the best genome."""


class Grammar:
    """Proposes `batch` candidates per step, and `varied` more for fast runners; implements `Explorer`.

    In steps that draw structures, the additional ones are good genomes with a component or some numbers changed, which
    costs much less time than the estimator.
    """

    name = "grammar"

    def __init__(self, batch: int = 8, varied: int = 0) -> None:
        self.batch = batch
        self.varied = varied

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """Return the classics first, then in turn new structures and refinements of the best genome.

        If the episodes have no probes, no genome probes.
        """
        mine = [
            standing
            for standing in context.standings
            if standing.candidate.explorer == self.name and not standing.candidate.is_tuned
        ]
        if not mine:
            first = [genome for genome in CLASSICS if context.has_probes or not may_probe(genome)]
            return [self._candidate(context, at, genome, {}) for at, genome in enumerate(first)]
        if context.step % REFINED_EVERY and any(standing.score is not None for standing in mine):
            return self._refine(context, mine)
        return self._draw(context, mine)

    def _draw(self, context: ExplorerContext, mine: Sequence[ScoredCandidate]) -> list[Candidate]:
        """Draw genomes from the estimator, fitted to earlier results, and vary the best of them."""
        rated, seed = ratings(mine), context.rng.getrandbits(32)
        parts = PARTS if context.has_probes else PARTS_WITHOUT_PROBES
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna warns that some options are experimental
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
            study = optuna.create_study(direction="maximize", sampler=sampler)
            fitted = _fitted(mine, rated) if self.varied else mine
            study.add_trials([_as_trial(standing, rated, parts) for standing in fitted])
            genomes = [_draw(study.ask(), parts) for _ in range(self.batch)]
        parents = sorted(mine, key=lambda standing: -rated[standing.candidate.digest])[:PARENTS]
        rng = random.Random(seed)
        genomes += [_varied(_bare(rng.choice(parents)), rng, parts) for _ in range(self.varied)]
        return [self._candidate(context, at, genome, {}) for at, genome in enumerate(genomes)]

    def _refine(self, context: ExplorerContext, mine: Sequence[ScoredCandidate]) -> list[Candidate]:
        """Return the next CMA-ES generation over the best genome's numbers, rebuilt from the earlier ones."""
        leader = max((own for own in mine if own.score is not None), key=lambda own: own.score or 0.0)
        lineage = leader.candidate.genome.get("line") or leader.candidate.digest
        genome = {name: value for name, value in leader.candidate.genome.items() if name in space(_bare(leader))}
        numbers = [name for name, kind in space(genome).items() if isinstance(kind, FloatDistribution)]
        if len(numbers) < 2:
            return self._draw(context, mine)
        bred = [standing for standing in mine if standing.candidate.genome.get("line") == lineage]
        start = bred[0].candidate.genome["start"] if bred else _to_unit(genome, numbers)
        seed = context.rng.getrandbits(31)
        bounds = np.tile([0.0, 1.0], (len(numbers), 1))
        rated = ratings(mine)
        earlier = [(_unit(standing, numbers), rated[standing.candidate.digest]) for standing in bred]
        children = [
            _from_unit(genome, numbers, vector)
            for vector in next_generation(start, earlier, seed, self.batch + self.varied, SIGMA, bounds)
        ]
        remembered = {"line": lineage, "start": [float(x) for x in start]}
        parent = leader.candidate.digest
        return [self._candidate(context, at, child, remembered, parent) for at, child in enumerate(children)]

    def _candidate(
        self,
        context: ExplorerContext,
        at: int,
        genome: Genome,
        remembered: Mapping[str, Any],
        parent: str | None = None,
    ) -> Candidate:
        name = f"grammar-{context.step}-{at}"
        note = "; ".join(f"{part} {genome[part]}" for part in PARTS)
        return Candidate(name, emit(genome), self.name, parent, note, genome={**genome, **remembered})


def _draw(trial: optuna.trial.BaseTrial, parts: Parts) -> dict[str, Any]:
    """Return the genome an optuna trial suggests."""
    genome: dict[str, Any] = {part: trial.suggest_categorical(part, list(options)) for part, options in parts.items()}
    for name, distribution in space(genome).items():
        if isinstance(distribution, FloatDistribution):
            low, high, log = distribution.low, distribution.high, distribution.log
            genome[name] = trial.suggest_float(name, low, high, log=log)
    return genome


def _fitted(mine: Sequence[ScoredCandidate], rated: Mapping[str, float]) -> Sequence[ScoredCandidate]:
    """Return the best and the latest results, to which the estimator is fitted; its time grows with their number."""
    best = sorted(range(len(mine)), key=lambda at: -rated[mine[at].candidate.digest])[: MOST_FITTED // 2]
    latest = range(max(0, len(mine) - MOST_FITTED // 2), len(mine))
    return [mine[at] for at in sorted({*best, *latest})]


def _varied(genome: Genome, rng: random.Random, parts: Parts) -> dict[str, Any]:
    """Return a genome with one or two components of `parts` drawn anew, and some of its numbers changed."""
    chosen: dict[str, Any] = {part: genome[part] for part in parts}
    for part in rng.sample(list(parts), rng.choice([0, 1, 1, 2])):
        chosen[part] = rng.choice(list(parts[part]))
    numbers = [name for name, kind in space(chosen).items() if isinstance(kind, FloatDistribution)]
    known = space(chosen)
    units = []
    for name in numbers:
        if name not in genome:
            units.append(rng.random())
        else:
            moved = SIGMA * rng.gauss(0, 1) if rng.random() < CHANGED else 0.0
            units.append(_scale(known[name], genome[name]) + moved)
    return _from_unit(chosen, numbers, units)


def _bare(scored: ScoredCandidate) -> dict[str, Any]:
    return dict(scored.candidate.genome)


def _as_trial(scored: ScoredCandidate, rated: Mapping[str, float], parts: Parts) -> optuna.trial.FrozenTrial:
    """Return a candidate as a finished optuna trial."""
    known = space(_bare(scored), parts)
    params = {name: scored.candidate.genome[name] for name in known}
    return optuna.trial.create_trial(params=params, distributions=known, value=rated[scored.candidate.digest])


def _to_unit(genome: Genome, numbers: Sequence[str]) -> list[float]:
    known = space(genome)
    return [_scale(known[name], genome[name]) for name in numbers]


def _unit(scored: ScoredCandidate, numbers: Sequence[str]) -> Any:
    return np.array(_to_unit(_bare(scored), numbers))


def _scale(kind: BaseDistribution, value: float) -> float:
    """Map a number to its position in its range, from 0 to 1."""
    if not isinstance(kind, FloatDistribution):
        raise TypeError(kind)
    if kind.log:
        return math.log(value / kind.low) / math.log(kind.high / kind.low)
    return (value - kind.low) / (kind.high - kind.low)


def _from_unit(genome: Genome, numbers: Sequence[str], units: Any) -> dict[str, Any]:
    known, child = space(genome), dict(genome)
    for name, unit in zip(numbers, np.clip(units, 0, 1), strict=True):
        kind = known[name]
        if isinstance(kind, FloatDistribution):
            ratio = kind.high / kind.low if kind.log else 0.0
            raw = kind.low * ratio ** float(unit) if kind.log else kind.low + (kind.high - kind.low) * float(unit)
            child[name] = min(kind.high, max(kind.low, round(raw, 6)))
    return child
