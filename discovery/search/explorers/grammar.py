"""Explorer without a model: policies put together from components, every number a monotonic function of β.

Structures and numbers are drawn by optuna's tree-structured Parzen estimator from the results of earlier genomes. In
between, CMA-ES refines the numbers of the best genome. Both are rebuilt from the history at every step, with the step's
own seed, so that a resumed run continues as it would have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from discovery.search.explorers import Candidate, ExplorerContext, ScoredCandidate
from discovery.search.explorers.controller_writer import emit
from discovery.search.explorers.evolution import failure_score, next_generation
from discovery.search.explorers.genome import CLASSICS, PARTS, Genome, space

SIGMA: Final = 0.12
"""Standard deviation of a lineage's first generation, as a fraction of a number's range."""
REFINED_EVERY: Final = 3
"""Every n-th step draws new structures; the others refine the numbers of the best genome."""


class Grammar:
    """Proposes `batch` candidates per step; implements `Explorer`."""

    name = "grammar"

    def __init__(self, batch: int = 8) -> None:
        self.batch = batch

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """Return the classics first, then in turn new structures and refinements of the best genome."""
        mine = [standing for standing in context.standings if standing.candidate.explorer == self.name]
        if not mine:
            return [self._candidate(context, at, genome, {}) for at, genome in enumerate(CLASSICS)]
        if context.step % REFINED_EVERY and any(standing.score is not None for standing in mine):
            return self._refine(context, mine)
        return self._draw(context, mine)

    def _draw(self, context: ExplorerContext, mine: Sequence[ScoredCandidate]) -> list[Candidate]:
        """Draw genomes from the estimator, fitted to all earlier results."""
        worst = failure_score(mine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna warns that some options are experimental
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            sampler = optuna.samplers.TPESampler(
                seed=context.rng.getrandbits(32), multivariate=True, group=True, constant_liar=True
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            study.add_trials([_as_trial(standing, worst) for standing in mine])
            genomes = [_draw(study.ask()) for _ in range(self.batch)]
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
        worst = failure_score(mine)
        earlier = [(_unit(standing, numbers), _value(standing, worst)) for standing in bred]
        children = [
            _from_unit(genome, numbers, vector)
            for vector in next_generation(start, earlier, seed, self.batch, SIGMA, bounds)
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


def _draw(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Return the genome an optuna trial suggests."""
    genome: dict[str, Any] = {part: trial.suggest_categorical(part, list(options)) for part, options in PARTS.items()}
    for name, distribution in space(genome).items():
        if isinstance(distribution, FloatDistribution):
            low, high, log = distribution.low, distribution.high, distribution.log
            genome[name] = trial.suggest_float(name, low, high, log=log)
    return genome


def _bare(scored: ScoredCandidate) -> dict[str, Any]:
    return dict(scored.candidate.genome)


def _value(scored: ScoredCandidate, worst: float) -> float:
    return worst if scored.score is None else scored.score


def _as_trial(scored: ScoredCandidate, worst: float) -> optuna.trial.FrozenTrial:
    """Return a candidate as a finished optuna trial."""
    known = space(_bare(scored))
    params = {name: scored.candidate.genome[name] for name in known}
    return optuna.trial.create_trial(params=params, distributions=known, value=_value(scored, worst))


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
