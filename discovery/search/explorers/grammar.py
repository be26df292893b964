"""A search that needs no key: controllers put together from components, every number a rising function of β.

A genome names one component for each part of a policy and gives each number that component needs as (lo, hi, g): its
value is lo + (hi - lo)·β^g. `emit` writes the controller down as a file that stands alone. Structure and numbers are
drawn by optuna's tree-structured Parzen estimator from how earlier genomes did; between that, the best one's are
refined by CMA-ES. Both are made anew from the history at every step, with the step's own seed: a resumed run goes on
as it was.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from discovery.search.explorers import Candidate, ExplorerContext, ScoredCandidate
from discovery.search.explorers.evolution import failure_score, next_generation

Genome = Mapping[str, Any]

GENTLE, STEEP = 0.3, 3.0
"""Bounds of the exponent of β."""
SIGMA: Final = 0.12
"""Spread of a line's first generation, in parts of a number's range."""
REFINED_EVERY: Final = 3
"""Of so many steps one draws new structures; the others refine the numbers of the best."""


class Knob(NamedTuple):
    """A number of a policy: what it is, the most it may range over, and how it is written."""

    name: str
    words: str
    low: float
    high: float
    whole: bool = False
    log: bool = False  # spread by factors, not by differences
    falls: bool = False  # a larger β lowers it, for that spends more

    def span(self, genome: Genome) -> tuple[float, float, float]:
        """What it is at β = 0 and at β = 1, and the exponent between."""
        ends = sorted((genome[f"{self.name}.lo"], genome[f"{self.name}.hi"]), reverse=self.falls)
        return ends[0], ends[1], genome[f"{self.name}.g"]


FIRST = Knob("first", "chains opened at once", 1, 64, whole=True, log=True)
MOST = Knob("most", "chains that may be opened at all", 1, 64, whole=True, log=True)
ENOUGH = Knob("enough", "chains that have ended that settle it whatever they say", 1, 64, whole=True, log=True)
LEAST = Knob("least", "finished chains before it may stop", 1, 12, whole=True, log=True)
SURE = Knob("sure", "confidence that the leader leads, to stop at", 0.5, 0.9995)
SHARE = Knob("share", "share of the votes the leader needs to stop", 0.4, 1.0)
LEAD = Knob("lead", "by how many standard deviations the leader must lead to stop", 0.3, 4.0)
STRETCH = Knob("stretch", "times the length of the finished at which it is given up", 1.0, 4.0)
PATIENCE = Knob("patience", "looks in a row at which a chain may differ from the leader", 2, 20, whole=True, log=True)
RUNNING = Knob("running", "chains kept running while it is not sure", 1, 32, whole=True, log=True)
WAVE = Knob("wave", "chains opened when those before have not settled it", 1, 24, whole=True, log=True)
SHORTER = Knob("shorter", "power by which a shorter chain's vote counts more", 0.0, 4.0)
VOICE = Knob("voice", "weight of what a running chain says beside a finished vote", 0.0, 1.0)

HORIZON = Knob("horizon", "intervals a chain may run", 4, 100, whole=True, log=True)

PARTS: Final[Mapping[str, Mapping[str, Sequence[Knob]]]] = {
    "widen": {"none": (), "refill": (RUNNING,), "wave": (WAVE,)},
    "stop": {"confidence": (SURE,), "share": (SHARE,), "lead": (LEAD,)},
    "prune": {"off": (), "long": (STRETCH,), "deviant": (PATIENCE,)},
    "weight": {"plain": (), "short": (SHORTER,)},
    "pool": {"finished": (), "all": (VOICE,)},
    "depth": {"whole": (), "horizon": (HORIZON,)},
    "pace": {"uniform": (), "lead": ()},
}
"""Parts of a policy, their components, and the numbers each needs; FIRST, MOST, ENOUGH and LEAST always."""
ALWAYS: Final = (FIRST, MOST, ENOUGH, LEAST)


def knobs(genome: Genome) -> list[Knob]:
    """The numbers a genome needs."""
    chosen = [knob for part, components in PARTS.items() for knob in components[genome[part]]]
    return [*ALWAYS, *chosen]


def looks(genome: Genome) -> bool:
    """Whether running chains are asked what they would say."""
    return bool(genome["pool"] == "all" or genome["prune"] == "deviant" or genome["pace"] == "lead")


def parks(genome: Genome) -> bool:
    """Whether chains may be left standing before their end."""
    return bool(genome["depth"] == "horizon")


# Writing it down


def emit(genome: Genome, name: str = "Discovered") -> str:
    """The controller as a file of its own."""
    parts = "; ".join(_WORDS[part][genome[part]] for part in PARTS)
    lines = [f'"""{_fill(f"Found by search. {parts}.")}"""', "", *_imports(genome), "", "", f"class {name}:"]
    lines += ["    def __init__(self, beta: float) -> None:"]
    lines += [f"        self.{knob.name} = {_formula(knob, genome)}  # {knob.words}" for knob in knobs(genome)]
    if genome["prune"] == "deviant":
        lines += ["        self.strayed: dict[int, int] = {}  # looks in a row at which a chain differed"]
    lines += [
        "",
        *_decide(genome),
        *_votes(genome),
        *_settled(genome),
        *_prune(genome),
        *_widen(genome),
        *_step(genome),
    ]
    return "\n".join(lines) + "\n"


def _formula(knob: Knob, genome: Genome) -> str:
    start, end, g = knob.span(genome)
    start, end = float(f"{start:.4g}"), float(f"{end:.4g}")  # so that the sum is in bounds too
    formula = f"{start:.4g} {'-' if end < start else '+'} {abs(end - start):.4g} * beta**{g:.3g}"
    return f"round({formula})" if knob.whole else formula


_WORDS: Final[Mapping[str, Mapping[str, str]]] = {
    "widen": {
        "none": "All chains are opened at once",
        "refill": "While it is not sure, a chain that ended makes room for a new one",
        "wave": "Chains are opened in waves, the next one when the last has not settled it",
    },
    "stop": {
        "confidence": "it stops when the leader is surely ahead of the second",
        "share": "it stops when the leader has its share of the votes",
        "lead": "it stops when the leader is ahead by enough standard deviations",
    },
    "prune": {
        "off": "no chain is given up",
        "long": "chains much longer than the finished ones are given up",
        "deviant": "chains that keep differing from the leader are given up",
    },
    "weight": {"plain": "votes count equally", "short": "votes of shorter chains count more"},
    "pool": {"finished": "finished chains vote", "all": "finished chains vote, and running ones with less weight"},
    "depth": {"whole": "chains run to their end", "horizon": "chains stand still at a horizon"},
    "pace": {
        "uniform": "all chains go on at one pace",
        "lead": "those that agree with the leader go on twice as fast",
    },
}


def _fill(text: str) -> str:
    """A docstring's text in lines."""
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 110:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines) + ("\n" if len(lines) > 1 else "")


def _imports(genome: Genome) -> list[str]:
    verbs = ["Action", "State", "advance", "answer", "branch"]
    verbs += ["probe"] if looks(genome) or parks(genome) else []
    verbs += ["prune"] if genome["prune"] != "off" else []
    helpers = ["confidence, top_two"] if genome["stop"] == "confidence" and counts(genome) else ["top_two"]
    return ["from __future__ import annotations", "", f"from controllers import {', '.join(verbs)}",
            f"from controllers.voting import {', '.join(helpers)}"]  # fmt: skip


def counts(genome: Genome) -> bool:
    """Whether votes are whole numbers."""
    return bool(genome["weight"] == "plain" and genome["pool"] == "finished")


def _decide(genome: Genome) -> list[str]:
    going = "i not in lost and state.branches[i].intervals < self.horizon" if parks(genome) else "i not in lost"
    lines = [
        "    def decide(self, state: State) -> list[Action]:",
        "        if not state.width:",
        "            return [branch()] * max(1, min(self.first, self.most, state.room))",
        "        votes = self.votes(state)",
        "        leader = max(votes, key=lambda label: votes[label], default=None)",
        "        lost = self.lost(state, leader)",
        f"        running = [i for i in state.active if {going}]",
        "        settled = self.settled(state, votes, state.width - len(running))",
        "        more = 0 if settled else self.wanted(state, running)",
        "        if settled or not (running or more):",
    ]
    if parks(genome):
        lines += [
            "            unasked = [i for i in state.active if state.branches[i].probed < state.branches[i].intervals]",
            "            if leader is None and unasked:",
            "                return [probe(i) for i in unasked]",
        ]
    return [
        *lines,
        "            return [answer(state.leader() if leader is None else leader)]",
        "        return self.moves(state, running, lost, leader) + [branch()] * more",
        "",
    ]


def _votes(genome: Genome) -> list[str]:
    head = ["    def votes(self, state: State) -> dict[int, float]:"]
    if counts(genome):
        return [*head, "        return dict(state.votes)", ""]
    lines = [*head, "        votes: dict[int, float] = {}"]
    if genome["weight"] == "short":
        lines += ["        shortest = min((state.branches[i].tokens for i in state.finished), default=1)"]
    lines += ["        for i in state.finished:", "            chain = state.branches[i]"]
    lines += ["            if chain.label is not None:"]
    weight = "(shortest / max(1, chain.tokens)) ** self.shorter" if genome["weight"] == "short" else "1"
    lines += [f"                votes[chain.label] = votes.get(chain.label, 0) + {weight}"]
    if genome["pool"] == "all":
        lines += [
            "        for i in state.active:",
            "            label = state.branches[i].label",
            "            if label is not None:",
            "                votes[label] = votes.get(label, 0) + self.voice",
        ]
    return [*lines, "        return votes", ""]


def _settled(genome: Genome) -> list[str]:
    lines = [
        "    def settled(self, state: State, votes: dict[int, float], ended: int) -> bool:",
        "        if ended >= self.enough:",
        "            return True",
        "        if len(state.finished) < self.least or not votes:",
        "            return False",
        "        first, second = top_two(votes)",
    ]
    if genome["stop"] == "share":
        return [*lines, "        return first >= self.share * sum(votes.values())", ""]
    if genome["stop"] == "confidence" and counts(genome):
        return [*lines, "        return confidence(first, second) >= self.sure", ""]
    if genome["stop"] == "confidence":
        return [*lines, "        return (first + 1) / (first + second + 2) >= self.sure", ""]
    return [*lines, "        return first - second >= self.lead * (first + second) ** 0.5", ""]


def _prune(genome: Genome) -> list[str]:
    head = ["    def lost(self, state: State, leader: int | None) -> list[int]:"]
    if genome["prune"] == "off":
        return [*head, "        return []", ""]
    if genome["prune"] == "long":
        return [
            *head,
            "        if len(state.finished) < self.least:",
            "            return []",
            "        lengths = sorted(state.branches[i].intervals for i in state.finished)",
            "        longest = self.stretch * lengths[len(lengths) // 2]",
            "        return [i for i in state.active if state.branches[i].intervals > longest]",
            "",
        ]
    return [
        *head,
        "        if leader is None or not state.finished:",
        "            return []",
        "        for i in state.active:",
        "            differs = state.branches[i].label != leader",
        "            self.strayed[i] = self.strayed.get(i, 0) + 1 if differs else 0",
        "        return [i for i in state.active if self.strayed[i] >= self.patience]",
        "",
    ]


def _widen(genome: Genome) -> list[str]:
    head = ["    def wanted(self, state: State, running: list[int]) -> int:"]
    room = "min(self.most - state.width, state.room)"
    if genome["widen"] == "none":
        return [*head, "        return 0", ""]
    if genome["widen"] == "refill":
        return [
            *head,
            "        if state.width == len(running):",
            "            return 0",
            f"        return max(0, min(self.running - len(running), {room}))",
            "",
        ]
    return [*head, f"        return 0 if running else max(0, min(self.wave, {room}))", ""]


def _step(genome: Genome) -> list[str]:
    head = [
        "    def moves(self, state: State, running: list[int], lost: list[int], leader: int | None) -> list[Action]:",
        f"        moves: list[Action] = {'[]' if genome['prune'] == 'off' else '[prune(i) for i in lost]'}",
        "        for i in running:",
    ]
    step = "advance(i)"
    if genome["pace"] == "lead":
        step = "advance(i, 2 if leader is not None and state.branches[i].label == leader else 1)"
    lines = [*head, f"            moves.append({step})"]
    if looks(genome):
        lines += ["            moves.append(probe(i))"]
    return [*lines, "        return moves"]


# Drawing genomes


def space(genome: Genome) -> dict[str, BaseDistribution]:
    """What the numbers and components of a genome may be."""
    found: dict[str, BaseDistribution] = {part: CategoricalDistribution(list(names)) for part, names in PARTS.items()}
    for knob in knobs(genome):
        for end in ("lo", "hi"):
            found[f"{knob.name}.{end}"] = FloatDistribution(knob.low, knob.high, log=knob.log)
        found[f"{knob.name}.g"] = FloatDistribution(GENTLE, STEEP, log=True)
    return found


def genome_of(parts: Mapping[str, str], **spans: tuple[float, float, float]) -> dict[str, Any]:
    """A genome of these components; numbers not named are in the middle of what they may be, at every β."""
    genome: dict[str, Any] = {part: parts.get(part, next(iter(names))) for part, names in PARTS.items()}
    for knob in knobs(genome):
        middle = math.sqrt(knob.low * knob.high) if knob.log else (knob.low + knob.high) / 2
        low, high, g = spans.get(knob.name, (middle, middle, 1.0))
        genome |= {f"{knob.name}.lo": low, f"{knob.name}.hi": high, f"{knob.name}.g": g}
    return genome


def _draw(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """The genome a trial suggests."""
    genome: dict[str, Any] = {part: trial.suggest_categorical(part, list(options)) for part, options in PARTS.items()}
    for name, distribution in space(genome).items():
        if isinstance(distribution, FloatDistribution):
            low, high, log = distribution.low, distribution.high, distribution.log
            genome[name] = trial.suggest_float(name, low, high, log=log)
    return genome


CLASSICS: Final[Sequence[Genome]] = (
    # shortest first: open many, vote on those that end first
    genome_of({}, first=(1, 64, 2), most=(64, 64, 1), enough=(1, 16, 2), least=(2, 8, 1), sure=(0.95, 0.999, 1)),
    # the same, without those that keep differing
    genome_of(
        {"stop": "lead", "prune": "deviant"},
        **{"first": (1, 64, 3), "most": (64, 64, 1), "enough": (1, 32, 2.5), "least": (2, 8, 1)},
        **{"lead": (1.2, 2.5, 1), "patience": (4, 16, 1)},
    ),
    # one after the other until it is sure
    genome_of(
        {"widen": "refill"},
        **{"first": (1, 4, 1), "most": (1, 64, 1), "enough": (1, 64, 1), "least": (2, 4, 1)},
        **{"running": (1, 8, 1), "sure": (0.9, 0.99, 1)},
    ),
    # in waves, shorter chains counting more
    genome_of(
        {"widen": "wave", "weight": "short", "stop": "lead"},
        **{"first": (1, 8, 1), "most": (1, 64, 1), "enough": (1, 64, 1), "least": (2, 4, 1)},
        **{"wave": (1, 16, 1), "lead": (1, 2.5, 1), "shorter": (1, 1, 1)},
    ),
    # little is spent on chains that get long
    genome_of(
        {"depth": "horizon", "prune": "deviant"},
        **{"first": (1, 64, 3), "most": (64, 64, 1), "enough": (1, 32, 2.5), "least": (2, 8, 1)},
        **{"sure": (0.9, 0.999, 1), "patience": (4, 16, 1), "horizon": (30, 90, 1)},
    ),
)
"""Where the search begins: what is known to do well."""


class Grammar:
    """The explorer: `batch` candidates a step."""

    name = "grammar"

    def __init__(self, batch: int = 8) -> None:
        self.batch = batch

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """Classics first; then by turns new structures, and the numbers of the best one refined."""
        mine = [one for one in context.standings if one.candidate.explorer == self.name]
        if not mine:
            return [self._candidate(context, at, genome, {}) for at, genome in enumerate(CLASSICS)]
        if context.step % REFINED_EVERY and any(one.score is not None for one in mine):
            return self._refine(context, mine)
        return self._draw(context, mine)

    def _draw(self, context: ExplorerContext, mine: Sequence[ScoredCandidate]) -> list[Candidate]:
        """Genomes by the estimator, from how all before them did."""
        worst = failure_score(mine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of being experimental
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            sampler = optuna.samplers.TPESampler(
                seed=context.rng.getrandbits(32), multivariate=True, group=True, constant_liar=True
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            study.add_trials([_told(one, worst) for one in mine])
            genomes = [_draw(study.ask()) for _ in range(self.batch)]
        return [self._candidate(context, at, genome, {}) for at, genome in enumerate(genomes)]

    def _refine(self, context: ExplorerContext, mine: Sequence[ScoredCandidate]) -> list[Candidate]:
        """A generation of CMA-ES over the best genome's numbers; generations before it are told it anew."""
        leader = max((one for one in mine if one.score is not None), key=lambda one: one.score or 0.0)
        line = leader.candidate.genome.get("line") or leader.candidate.digest
        genome = {name: value for name, value in leader.candidate.genome.items() if name in space(_bare(leader))}
        numbers = [name for name, kind in space(genome).items() if isinstance(kind, FloatDistribution)]
        if len(numbers) < 2:
            return self._draw(context, mine)
        bred = [one for one in mine if one.candidate.genome.get("line") == line]
        start = bred[0].candidate.genome["start"] if bred else _to_unit(genome, numbers)
        seed = context.rng.getrandbits(31)
        bounds = np.tile([0.0, 1.0], (len(numbers), 1))
        worst = failure_score(mine)
        told = [(_unit(one, numbers), _value(one, worst)) for one in bred]
        children = [
            _from_unit(genome, numbers, vector)
            for vector in next_generation(start, told, seed, self.batch, SIGMA, bounds)
        ]
        remembered = {"line": line, "start": [float(x) for x in start]}
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


def _bare(one: ScoredCandidate) -> dict[str, Any]:
    return dict(one.candidate.genome)


def _value(one: ScoredCandidate, worst: float) -> float:
    return worst if one.score is None else one.score


def _told(one: ScoredCandidate, worst: float) -> optuna.trial.FrozenTrial:
    """A candidate as a finished trial."""
    known = space(_bare(one))
    params = {name: one.candidate.genome[name] for name in known}
    return optuna.trial.create_trial(params=params, distributions=known, value=_value(one, worst))


def _to_unit(genome: Genome, numbers: Sequence[str]) -> list[float]:
    known = space(genome)
    return [_scale(known[name], genome[name]) for name in numbers]


def _unit(one: ScoredCandidate, numbers: Sequence[str]) -> Any:
    return np.array(_to_unit(_bare(one), numbers))


def _scale(kind: BaseDistribution, value: float) -> float:
    """Where a number lies in its range, from 0 to 1."""
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
