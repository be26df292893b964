"""Writes the controller that a genome describes as a self-contained file.

The file counts votes only when a chain has finished, and repeats its last round while nothing has happened. Replay of a
candidate mostly waits for its decisions, so that this is what a search spends its time on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from discovery.search.explorers.genome import (
    PARTS,
    Genome,
    Knob,
    has_horizon,
    has_whole_votes,
    knobs,
    probes_running,
    signals_of,
)


def emit(genome: Genome, name: str = "Discovered") -> str:
    """Return the source of the controller that a genome describes."""
    parts = "; ".join(_DESCRIPTIONS[part][genome[part]] for part in PARTS if _DESCRIPTIONS[part][genome[part]])
    lines = [f'"""{_fill(f"Found by search. {parts}.")}"""', "", *_imports(genome), "", "", f"class {name}:"]
    if signals := signals_of(genome):
        names = ", ".join(f'"{signal}"' for signal in signals)
        lines += [f"    signals = ({names}{',' if len(signals) == 1 else ''})", ""]
    lines += ["    def __init__(self, beta: float) -> None:"]
    lines += [f"        self.{knob.name} = {_formula(knob, genome)}  # {knob.comment}" for knob in knobs(genome)]
    lines += [*_memory(genome), "", *_decide(genome), *_count(genome), *_voters(genome), *_settled(genome)]
    lines += [*_all_votes(genome), *_lost(genome)]
    while not lines[-1]:
        lines.pop()
    return "\n".join(lines) + "\n"


def repeats_rounds(genome: Genome) -> bool:
    """Return whether a round can be repeated until a chain has ended, because nothing else matters."""
    return not probes_running(genome) and genome["prune"] == "off" and not has_horizon(genome)


def is_counted(genome: Genome) -> bool:
    """Return whether the controller adds up votes itself, because the state's counts do not suffice."""
    return bool(genome["weight"] != "plain" or genome["filter"] != "off")


def _formula(knob: Knob, genome: Genome) -> str:
    start, change, g = knob.terms(genome)
    formula = f"{start:.4g} {'-' if change < 0 else '+'} {abs(change):.4g} * beta**{g:.3g}"
    return f"round({formula})" if knob.is_integer else formula


_DESCRIPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "widen": {
        "none": "All chains are opened at once",
        "refill": "A new chain replaces one that has ended, until it stops",
        "wave": "Chains are opened in waves of one size, each when the last has ended",
        "growing": "Chains are opened in growing waves, and unfinished chains count against the leader",
    },
    "stop": {
        "confidence": "it stops when the leader is probably ahead of the second answer",
        "share": "it stops when the leader has a share of the votes",
        "lead": "it stops when the leader is ahead by some standard deviations",
        "margin": "it stops when the leader's share of the votes is larger than the second's by a margin",
        "bayes": "it stops at a Bayes factor for the leader",
        "certified": "it stops when a sequential test certifies the leader",
        "gain": "it stops when more chains are not worth their tokens",
    },
    "prune": {
        "off": "no chain is pruned",
        "long": "chains much longer than the finished ones are pruned",
        "deviant": "chains that keep differing from the leader are pruned",
        "unstable": "chains that keep changing their answer are pruned",
        "doubtful": "chains less confident than those of the leader are pruned",
        "weak": "chains with a less confident window than the first finished ones are pruned",
    },
    "weight": {
        "plain": "votes count equally",
        "length": "votes are weighted by length",
        "likelihood": "votes are weighted by log-probability",
        "confidence": "votes are weighted by mean token probability",
        "length and confidence": "votes are weighted by length and by mean token probability",
        "probe": "votes are weighted by the probability of the latest probe",
    },
    "filter": {"off": "", "confident": "the least confident finished chains do not vote"},
    "pool": {"finished": "finished chains vote", "all": "finished chains vote, and running ones by their probes"},
    "depth": {"whole": "chains run to their end", "horizon": "chains stop at a horizon"},
    "pace": {
        "uniform": "all chains advance equally",
        "lead": "chains that agree with the leader advance twice as fast",
    },
}


def _fill(text: str) -> str:
    """Wrap a docstring's text into lines."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > 110:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines) + ("\n" if len(lines) > 1 else "")


def _imports(genome: Genome) -> list[str]:
    verbs = ["Action", "State", "advance", "answer", "branch"]
    verbs += ["probe"] if probes_running(genome) or has_horizon(genome) else []
    verbs += ["prune"] if genome["prune"] != "off" else []
    if genome["filter"] != "off":
        verbs = ["Action", "Branch", *verbs[1:]]
    helpers = ["plurality"]
    helpers += ["WeightedTally"] if is_counted(genome) else []
    helpers += ["confidence"] if genome["stop"] == "confidence" else []
    helpers += ["top_two"] if genome["stop"] not in ("bayes", "certified") else []
    stops = {"bayes": "bayes_factor", "certified": "is_certified"}
    lines = ["from __future__ import annotations", ""]
    if maths := [*["inf"] * (genome["prune"] in ("long", "doubtful")), *["log"] * _needs_log(genome)]:
        lines += [f"from math import {', '.join(maths)}", ""]
    lines += [f"from controllers import {', '.join(verbs)}"]
    lines += ["from controllers.baselines.adaptive_consistency import gain"] if genome["stop"] == "gain" else []
    lines += ["from controllers.signals import LOG_CONFIDENCE"] if genome["weight"] == "probe" else []
    lines += [f"from controllers.stopping import {stops[genome['stop']]}"] if genome["stop"] in stops else []
    order = sorted(helpers, key=lambda helper: (not helper[0].isupper(), helper))
    return [*lines, f"from controllers.voting import {', '.join(order)}"]


def _needs_log(genome: Genome) -> bool:
    return bool(genome["weight"] in ("length", "length and confidence") or genome["prune"] == "doubtful")


def _memory(genome: Genome) -> list[str]:
    """Return the attributes in which the controller keeps what it has computed."""
    lines = ["        self.counted = 0  # finished chains behind the votes"]
    lines += ["        self.votes: dict[int, float] = {}", "        self.leader: int | None = None"]
    if repeats_rounds(genome):
        lines += ["        self.before: tuple[int, ...] = ()  # chains running in the last round"]
        lines += ["        self.steps: list[Action] = []  # the last round, without new chains"]
    if is_counted(genome) and genome["filter"] == "off":
        lines += ["        self.tally = WeightedTally()"]
    return (
        lines
        + {
            "off": [],
            "long": ["        self.longest = inf  # intervals"],
            "deviant": [
                "        self.strayed: dict[int, int] = {}  # consecutive probes that differed from the leader"
            ],
            "unstable": [
                "        self.said: dict[int, int] = {}  # latest answer of each running chain",
                "        self.changes: dict[int, int] = {}  # changes of its answer, less its repetitions",
            ],
            "doubtful": ["        self.level = -inf  # mean log-probability of a token below which a chain is pruned"],
            "weak": [
                "        self.limit = -1  # confidence of a window below which a chain is pruned; -1 while unknown"
            ],
        }[genome["prune"]]
    )


def _decide(genome: Genome) -> list[str]:
    prunes = genome["prune"] != "off"
    lines = [
        "    def decide(self, state: State) -> list[Action]:",
        "        if not state.width:",
        "            return [branch()] * max(1, min(self.first, self.most, state.room))",
    ]
    if repeats_rounds(genome):
        lines += [
            "        if self.counted == len(state.finished) and self.before == state.active:",
            "            return self.steps",
        ]
    lines += ["        if self.counted < len(state.finished):", "            self.count(state)"]
    if genome["pool"] == "all":
        lines += ["        votes = self.all_votes(state)", "        leader = plurality(votes)"]
    else:
        lines += ["        votes, leader = self.votes, self.leader"]
    lines += ["        lost = self.lost(state, leader)"] if prunes else []
    conditions = ["i not in lost"] * prunes
    conditions += ["state.branches[i].intervals < self.horizon"] * has_horizon(genome)
    chosen = f"[i for i in state.active if {' and '.join(conditions)}]" if conditions else "list(state.active)"
    lines += [f"        running = {chosen}", *_more(genome)]
    lines += [
        "        settled = self.settled(state, votes, leader, len(running))",
        "        if settled or not (running or more):",
    ]
    if has_horizon(genome):
        lines += [
            "            unasked = [i for i in state.active if state.branches[i].probed < state.branches[i].intervals]",
            "            if leader is None and unasked:",
            "                return [probe(i) for i in unasked]",
        ]
    lines += ["            return [answer(state.leader() if leader is None else leader)]"]
    if repeats_rounds(genome):
        lines += ["        self.before, self.steps = state.active, [advance(i) for i in running]"]
        return [*lines, "        return self.steps + [branch()] * more", ""]
    step = "advance(i)"
    if genome["pace"] == "lead":
        step = "advance(i, 2 if leader is not None and state.branches[i].label == leader else 1)"
    lines += [f"        moves: list[Action] = {'[prune(i) for i in lost]' if prunes else '[]'}"]
    lines += ["        for i in running:", f"            moves.append({step})"]
    lines += ["            moves.append(probe(i))"] if probes_running(genome) else []
    return [*lines, "        return moves + [branch()] * more", ""]


def _more(genome: Genome) -> list[str]:
    """Return the lines that compute how many chains to open."""
    if genome["widen"] == "none":
        return ["        more = 0"]
    wanted = {
        "refill": "self.running - len(running) if len(running) < state.width else 0",
        "wave": "0 if running else self.wave",
        "growing": "0 if running else max(1, round(self.growth * state.width))",
    }[genome["widen"]]
    return [
        f"        wanted = {wanted}",
        "        more = max(0, min(wanted, self.most - state.width, state.room))",
    ]


_SCORES: Final[Mapping[str, str]] = {
    "plain": "0.0",
    "length": "self.power * log(max(1, chain.tokens))",
    "likelihood": "None if chain.log_probability is None else chain.log_probability / self.scale",
    "confidence": "None if chain.log_probability is None else self.strength * chain.log_probability / chain.tokens",
    "length and confidence": "None if known is None else self.power * log(size) + self.strength * known / size",
    "probe": "None if chain.probe_confidence is None else self.belief * LOG_CONFIDENCE[chain.probe_confidence]",
}
"""Logarithm of a chain's weight, by the component `weight`."""


def _count(genome: Genome) -> list[str]:
    lines = ["    def count(self, state: State) -> None:"]
    if is_counted(genome):
        if genome["filter"] == "off":
            lines += ["        for i in state.finished[self.counted :]:", "            chain = state.branches[i]"]
            tally = "self.tally"
        else:
            lines += ["        tally = WeightedTally()", "        for chain in self.voters(state):"]
            tally = "tally"
        lines += [
            "            if chain.label is not None:",
            *["                size, known = chain.tokens, chain.log_probability"]
            * (genome["weight"] == "length and confidence"),
            f"                score = {_SCORES[genome['weight']]}",
            f"                {tally}.add(chain.label, score)",
            f"        self.votes = {tally}.votes()",
        ]
    else:
        lines += ["        self.votes = dict(state.votes)"]
    lines += ["        self.counted = len(state.finished)", "        self.leader = plurality(self.votes)"]
    enough = ["        if self.counted >= self.least:"]
    return [*lines, *{
        "long": [
            *enough,
            "            lengths = sorted(state.branches[i].intervals for i in state.finished)",
            "            self.longest = self.stretch * lengths[len(lengths) // 2]",
        ],
        "doubtful": [
            *enough,
            "            chains = [state.branches[i] for i in state.finished]",
            "            chains = [c for c in chains if c.label == self.leader]",
            "            known = [c.log_probability / c.tokens for c in chains if c.log_probability is not None]",
            "            self.level = sum(known) / len(known) + log(self.trust) if known else -inf",
        ],
        "weak": [
            "        if self.limit < 0 and self.counted >= self.least:",
            "            chains = [state.branches[i] for i in state.finished]",
            "            known = sorted(chain.lowest for chain in chains if chain.lowest is not None)",
            "            self.limit = known[int(self.floor * len(known))] if known else -1",
        ],
    }.get(genome["prune"], []), ""]  # fmt: skip


def _voters(genome: Genome) -> list[str]:
    if genome["filter"] == "off":
        return []
    return [
        "    def voters(self, state: State) -> list[Branch]:",
        "        chains = [state.branches[i] for i in state.finished]",
        "        known = sorted(c.log_probability / c.tokens for c in chains if c.log_probability is not None)",
        "        if not known:",
        "            return chains",
        "        least = known[len(known) - max(1, round(self.kept * len(known)))]",
        "        return [c for c in chains if c.log_probability is None or c.log_probability / c.tokens >= least]",
        "",
    ]


def _settled(genome: Genome) -> list[str]:
    grows = genome["widen"] == "growing"
    lines = [
        "    def settled(self, state: State, votes: dict[int, float], leader: int | None, running: int) -> bool:",
        "        if state.width - running >= self.enough:",
        "            return True",
        "        if leader is None or len(state.finished) < self.least:",
        "            return False",
    ]
    if grows or genome["stop"] == "gain":
        lines += [f"        more = {'0' if genome['widen'] == 'none' else 'min(self.most - state.width, state.room)'}"]
    if grows:
        lines += [
            "        if running:  # worst case: all unfinished chains vote for the second answer",
            "            others = (label for label in votes if label != leader)",
            "            second = max(others, key=lambda label: votes[label], default=-1)",
            "            votes = {**votes, second: votes.get(second, 0) + running}",
            "            if votes[second] >= votes[leader]:",
            "                return False",
            "            if more <= 0:",
            "                return True",
        ]
    counts = (
        "[int(count) for count in votes.values()]"
        if has_whole_votes(genome)
        else "[round(count) for count in votes.values()]"
    )
    if genome["stop"] == "bayes":
        return [*lines, f"        return bayes_factor({counts}) >= self.factor", ""]
    if genome["stop"] == "certified":
        return [*lines, f"        return is_certified({counts}, self.error)", ""]
    lines += ["        first, second_most = top_two(votes)"]
    rules = {
        "confidence": "confidence(round(first), round(second_most)) >= self.sure",
        "share": "first >= self.share * sum(votes.values())",
        "lead": "first - second_most >= self.lead * (first + second_most) ** 0.5",
        "margin": "first - second_most >= self.margin * sum(votes.values())",
    }
    if genome["stop"] == "gain":
        lines += ["        total = sum(votes.values())"]
        left = "total * max(0, more) / state.width" if grows else (
            "total * (running + max(0, more)) / (state.width - running)")  # fmt: skip
        return [*lines, f"        return gain(first, second_most, total, {left}) < self.worth", ""]
    return [*lines, f"        return {rules[genome['stop']]}", ""]


def _all_votes(genome: Genome) -> list[str]:
    if genome["pool"] == "finished":
        return []
    return [
        "    def all_votes(self, state: State) -> dict[int, float]:",
        "        votes = dict(self.votes)",
        "        for i in state.active:",
        "            label = state.branches[i].label",
        "            if label is not None:",
        "                votes[label] = votes.get(label, 0) + self.voice",
        "        return votes",
        "",
    ]


def _lost(genome: Genome) -> list[str]:
    if genome["prune"] == "off":
        return []
    head = ["    def lost(self, state: State, leader: int | None) -> list[int]:"]
    unless = ["        if leader is None or not state.finished:", "            return []"]
    return [*head, *{
        "long": ["        return [i for i in state.active if state.branches[i].intervals > self.longest]"],
        "deviant": [
            *unless,
            "        for i in state.active:",
            "            differs = state.branches[i].label != leader",
            "            self.strayed[i] = self.strayed.get(i, 0) + 1 if differs else 0",
            "        return [i for i in state.active if self.strayed[i] >= self.patience]",
        ],
        "unstable": [
            "        for i in state.active:",
            "            label = state.branches[i].label",
            "            if label is None:",
            "                continue",
            "            if i in self.said:",
            "                change = -1 if label == self.said[i] else 1",
            "                self.changes[i] = max(0, self.changes.get(i, 0) + change)",
            "            self.said[i] = label",
            *unless,
            "        return [i for i in state.active if self.changes.get(i, 0) >= self.flips]",
        ],
        "doubtful": [
            "        chains = [(i, state.branches[i]) for i in state.active]",
            "        known = [(i, c.log_probability, c.tokens) for i, c in chains if c.log_probability is not None]",
            "        return [i for i, total, tokens in known if total < self.level * tokens]",
        ],
        "weak": [
            "        known = [(i, state.branches[i].lowest) for i in state.active]",
            "        return [i for i, lowest in known if lowest is not None and lowest < self.limit]",
        ],
    }[genome["prune"]], ""]  # fmt: skip
