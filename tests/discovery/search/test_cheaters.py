"""The sandbox against controllers that cheat for a score, and its transparency for honest controllers."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from controllers.builtin import BUILT_IN
from controllers.loading import Spec
from discovery.data.importers import read_release, release_cell
from discovery.data.recordings import intern_answers
from discovery.data.traces import trace_files
from discovery.evaluation.engines import EngineName
from discovery.evaluation.replay_jobs import Job, ReplayRules, Sealing, run_job
from discovery.evaluation.scores import Score
from tests.discovery.evaluation.test_evaluate import CELL, SOURCE, scores
from tests.discovery.evaluation.test_published import FOLDER

pytestmark = pytest.mark.process

HONEST = """
{top}
from controllers import State, advance, answer, branch, probe

class Mine:
    def __init__(self, beta):
        self.most = 2 + round(6 * beta)

    def decide(self, state: State):
        if not state.width:
            return [branch()] * self.most
        {cheat}
        return [advance(i) for i in state.active] or [answer(state.leader())]
"""
CHEATS = {  # code at the top of the file, and in each decision
    "peeks at its callers": (
        "import sys",
        "frame = sys._getframe()\n"
        "        while frame:\n"
        "            for thing in list(frame.f_locals.values()):\n"
        "                known = getattr(getattr(thing, 'recording', None), 'reference', None)\n"
        "                if known in getattr(thing, 'revealed', ()): return [answer(thing.revealed.index(known))]\n"
        "            frame = frame.f_back",
    ),
    "forges a result": (
        "import os, struct",
        "os.write(3, struct.pack('=Iqqqq', 32, 3, 1, 1, 100)); os.write(1, b'right')",
    ),
    "memorises the order of questions": (
        "seen = []",
        "if state.rounds == 1: seen.append(state)\n        if len(seen) % 3 == 1: return [answer(state.leader())]",
    ),
    "recognises a question by its chains": (
        "known = {}",
        "sizes = frozenset(state.branches[i].tokens for i in state.finished)\n"
        "        if sizes in known: return [answer(state.leader())]\n"
        "        if len(state.finished) == 1: known[sizes] = state.leader()",
    ),
    "opens more branches than there are": ("", "return [branch()] * (state.limits.max_branches + 1 - state.width)"),
    "answers what is no number": ("", "return [answer(float('nan'))]"),
    "answers what nobody said": ("", "return [answer(state.labels + 3)]"),
    "spends only when it is evaluated": ("", "if state.limits.max_tokens is not None: return [answer(state.leader())]"),
    "makes its tokens cost nothing": (
        "",
        "state.spent = 0\n        for one in state.branches: one.tokens = one.intervals = 0",
    ),
    "raises when it would lose": (
        "",
        "if not state.active and max(state.votes.values()) < self.most - 2: raise ValueError",
    ),
    "patches the clock it is timed by": (
        "import time, sys",
        "time.perf_counter = time.monotonic = lambda: 0.0",
    ),
    "patches what encodes its actions": (
        "import sys",
        "sys.modules['controllers.sandbox.process'].encode_actions = lambda actions: [1, 1 + 8 * (1 << 20)]",
    ),
}
HARMLESS = {"peeks at its callers", "makes its tokens cost nothing", "patches the clock it is timed by"}
"""Cheats without effect: these controllers decide and score as the honest one."""


def spec(cheat: str | None = None) -> Spec:
    top, body = CHEATS[cheat] if cheat else ("", "pass")
    return Spec("mine", HONEST.format(top=top, cheat=body))


def play_it(cheat: str | None) -> Score:
    (score,) = scores(spec(cheat), betas=[1.0], cells=[CELL])
    return score


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the audited episodes equally in every run, because a few draws miss a cheat."""
    monkeypatch.setattr(random, "SystemRandom", lambda: random.Random(0))


@pytest.fixture(scope="module")
def honest() -> Score:
    return play_it(None)


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_scores_above_the_honest_controller(cheat: str, honest: Score) -> None:
    score = play_it(cheat)
    assert honest.failures == []
    if cheat in HARMLESS:
        assert np.array_equal(score.outcomes, honest.outcomes)
    elif cheat == "raises when it would lose":  # other episodes are unchanged, failed ones count as wrong
        left = score.column("failed") == 1
        assert 0 < left.sum() < left.size
        assert score.column("right")[left].sum() == 0
        assert np.array_equal(score.outcomes[:, ~left], honest.outcomes[:, ~left])
    else:
        assert len(score.failures) == score.episodes
        assert score.accuracy == 0


@pytest.mark.parametrize("cheat", ["memorises the order of questions", "spends only when it is evaluated"])
def test_decisions_that_depend_on_other_episodes_or_the_audit_are_reported(cheat: str) -> None:
    message = play_it(cheat).failures[0].message
    assert "alone in its process, under a token limit, it decided otherwise" in message


def test_some_cheats_would_succeed_outside_the_sandbox() -> None:
    """Shows that sealing matters: without it, peeking and forging tokens raise the score."""
    cheats = [spec("peeks at its callers"), spec("makes its tokens cost nothing")]
    unsealed = ReplayRules(16, sealing=Sealing.NONE)
    measured = [scores(cheat, betas=[1.0], cells=[CELL], rules=unsealed)[0] for cheat in cheats]
    honest = play_it(None)
    assert measured[0].accuracy > honest.accuracy
    assert measured[1].mean("tokens") < honest.mean("tokens")


# Honest controllers

CAREFUL = """
from __future__ import annotations
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from statistics import median
from controllers import Action, State, advance, answer, branch, probe, prune
from controllers.dial import linear
from controllers.voting import confidence, tally, top_two

@lru_cache(maxsize=None)
def enough(beta: float) -> float:
    return linear(0.7, 0.95, beta)

@dataclass
class Careful:
    beta: float
    seen: dict[int, int] = field(default_factory=dict, init=False)

    @cached_property
    def width(self) -> int:
        return round(linear(3, 16, self.beta))

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [branch()] * min(self.width, state.room)
        votes = tally(chain.label for chain in state.branches if not chain.pruned)
        if not state.active or (state.rounds > 8 and confidence(*top_two(votes)) > enough(self.beta)):
            return [answer(state.leader())]
        long = 2 * median(chain.intervals for chain in state.branches)
        cut = [i for i in state.active if state.branches[i].intervals > long]
        return [prune(i) for i in cut] + [move for i in state.active if i not in cut for move in (advance(i), probe(i))]
"""
ENGINES = (EngineName.LOCAL, EngineName.PROCESS)
ORDERS = int(os.environ.get("SOAK_ORDERS", "4"))
"""Branch orders on public recordings."""
IN_PLACE = """
from controllers import *
class InPlace:
    def __init__(self, beta): ...
    def decide(self, state):
        if not state.width: return [branch()] * 4
        plan = state.last.actions
        plan[:] = [advance(i) for i in state.active] or [answer(state.leader())]
        return plan
"""
"""Source of a controller that changes its last round and returns it as the next one."""
HONEST_ONES = [*(Spec(name) for name in BUILT_IN), spec(), Spec("careful", CAREFUL), Spec("in_place", IN_PLACE)]


def traced(spec: Spec, folder: Path, sealing: Sealing) -> list[dict[str, object]]:
    scores(spec, betas=[0.5], rules=ReplayRules(16, traces=folder, sealing=sealing))
    columns = [dict(np.load(file)) for file in trace_files(folder)]
    return [{name: column.tolist() for name, column in one.items() if name != "about"} for one in columns]


@pytest.mark.parametrize("spec", HONEST_ONES, ids=lambda spec: spec.name)
def test_honest_controllers_play_the_same_episodes_sealed_and_unsealed(spec: Spec, tmp_path: Path) -> None:
    sealed, plain = (traced(spec, tmp_path / how, how) for how in (Sealing.ALL, Sealing.NONE))
    assert sealed == plain
    assert len(sealed) == len(SOURCE.cells())


def test_engines_give_the_same_scores_for_a_sealed_controller() -> None:
    local, process = (scores(Spec("careful", CAREFUL), betas=[1.0], engine=engine) for engine in ENGINES)
    assert [one.outcomes.tolist() for one in local] == [one.outcomes.tolist() for one in process]


@pytest.mark.no_cover
@pytest.mark.skipif(not (FOLDER / "autotts").is_dir(), reason="the public recordings are not beside the project")
@pytest.mark.parametrize("spec", HONEST_ONES, ids=lambda spec: spec.name)
def test_honest_controllers_score_the_same_sealed_and_unsealed_on_public_recordings(spec: Spec) -> None:
    path = FOLDER / "autotts" / "Qwen3-1.7B" / "aime25.json.xz"
    recordings = [intern_answers(recorded) for recorded in read_release(path)]
    job = Job(spec, 0.5, release_cell(path), range(ORDERS))
    sealed, plain = (run_job(job, recordings, ReplayRules(sealing=how)) for how in (Sealing.ALL, Sealing.NONE))
    assert sealed.outcomes[0].size == ORDERS * len(recordings)
    assert sealed.failures == plain.failures == []
    assert np.array_equal(sealed.outcomes, plain.outcomes)
