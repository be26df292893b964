"""Writes the controller that a genome describes as a self-contained file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from discovery.search.explorers.genome import PARTS, Genome, Knob, has_horizon, knobs, probes_running


def emit(genome: Genome, name: str = "Discovered") -> str:
    """Return the source of the controller that a genome describes."""
    parts = "; ".join(_DESCRIPTIONS[part][genome[part]] for part in PARTS)
    lines = [f'"""{_fill(f"Found by search. {parts}.")}"""', "", *_imports(genome), "", "", f"class {name}:"]
    lines += ["    def __init__(self, beta: float) -> None:"]
    lines += [f"        self.{knob.name} = {_formula(knob, genome)}  # {knob.comment}" for knob in knobs(genome)]
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
    start, end = float(f"{start:.4g}"), float(f"{end:.4g}")  # rounded first, so that the sum stays in bounds
    formula = f"{start:.4g} {'-' if end < start else '+'} {abs(end - start):.4g} * beta**{g:.3g}"
    return f"round({formula})" if knob.is_integer else formula


_DESCRIPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
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
    helpers = ["confidence, top_two"] if genome["stop"] == "confidence" and has_whole_votes(genome) else ["top_two"]
    return ["from __future__ import annotations", "", f"from controllers import {', '.join(verbs)}",
            f"from controllers.voting import {', '.join(helpers)}"]  # fmt: skip


def has_whole_votes(genome: Genome) -> bool:
    """Return whether votes are whole numbers."""
    return bool(genome["weight"] == "plain" and genome["pool"] == "finished")


def _decide(genome: Genome) -> list[str]:
    going = "i not in lost and state.branches[i].intervals < self.horizon" if has_horizon(genome) else "i not in lost"
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
    if has_horizon(genome):
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
    if has_whole_votes(genome):
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
    if genome["stop"] == "confidence" and has_whole_votes(genome):
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
    if probes_running(genome):
        lines += ["            moves.append(probe(i))"]
    return [*lines, "        return moves"]
