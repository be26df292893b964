"""The sandbox: its frame encoding, its processes and how they end, deadlines, and the proof of the seal."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers import (
    TO_END,
    Action,
    Advanced,
    Boundary,
    BoundaryViolation,
    ControllerError,
    Fact,
    Limits,
    MachineDisturbed,
    Probed,
    Round,
    SandboxUnavailable,
    State,
    Verb,
    advance,
    answer,
    branch,
    probe,
    prune,
    run_episode,
)
from controllers.errors import BadController
from controllers.loading import Spec
from controllers.sandbox import attempts, frames, process, proof, spawner
from controllers.sandbox import handle as handles
from controllers.sandbox.controller import SandboxedController, episodes_per_message, run_together
from controllers.sandbox.deadline import Clock, Deadline
from controllers.sandbox.exit_reasons import explain_late
from controllers.sandbox.frames import BadFrame, Decision, most_actions
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.process_usage import ProcessUsage, ProcessUsageReader
from controllers.sandbox.proof import AttemptResult, Proof, SandboxLevel, prove
from controllers.sandbox.seal import ALL_LAYERS, Layer
from controllers.sandbox.spawner import SandboxSpawner
from controllers.sandbox.zygote import SPAWN
from tests.fakes import ScriptedEnvironment, chain

pytestmark = pytest.mark.process

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux seals processes")
CHAINS = [chain("7", 60, ["7"]), chain("8", 90, ["8"], mark="b"), chain("7", 75, ["7"], mark="c")]
LIMITS = Limits(10)
HEAD = """
from controllers import *
class Mine:
    def __init__(self, beta): self.beta = beta
    def decide(self, state):
"""
STEPPING = HEAD + (
    "        if not state.width: return [branch(), branch(), branch()]\n"
    "        return [advance(i) for i in state.active] or [answer(state.leader())]\n"
)

# Frames

counts = st.integers(0, 1 << 20)
confidences = st.none() | st.integers(0, 1000)
labels = st.none() | st.integers(0, 1 << 20)
actions = st.one_of(
    st.builds(branch, st.sampled_from([1, 2, 99, TO_END])),
    st.builds(advance, counts, st.sampled_from([1, 2, 99, TO_END])),
    st.builds(probe, counts),
    st.builds(prune, counts),
    st.builds(answer, labels),
)


@given(action=actions)
def test_an_encoded_action_decodes_to_itself(action: Action) -> None:
    assert frames.decode_action(frames.encode_action(action)) == action


@given(number=st.integers(-(1 << 63), (1 << 63) - 1))
def test_a_number_decodes_to_one_action_or_is_refused(number: int) -> None:
    try:
        action = frames.decode_action(number)
    except BadFrame:
        return
    assert frames.encode_action(action) == number


@pytest.mark.parametrize("action", [answer(-1), Action(Verb.PROBE, 1 << 40), Action(Verb.BRANCH, 7, 1)])
def test_an_impossible_action_is_refused_by_the_encoding(action: Action) -> None:
    with pytest.raises(BadFrame):
        frames.decode_action(frames.encode_action(action))


@given(
    asked=st.lists(actions.filter(lambda action: action.verb is not Verb.ANSWER), max_size=8),
    cut=st.integers(0, 8),
    draw=st.data(),
)
def test_an_encoded_round_decodes_to_the_same_actions_and_facts(
    asked: list[Action], cut: int, draw: st.DataObject
) -> None:
    carried_out, width = asked[:cut], 5
    facts: list[Fact] = []
    opened = width
    for action in carried_out:
        index = opened if action.verb is Verb.BRANCH else action.branch
        opened += action.verb is Verb.BRANCH
        if action.verb is Verb.PROBE:
            facts.append(Probed(index, draw.draw(labels), draw.draw(counts), draw.draw(confidences)))
        elif action.verb is not Verb.PRUNE:
            finished = draw.draw(st.booleans())
            label = draw.draw(labels) if finished else None
            signals = draw.draw(confidences), draw.draw(confidences)
            facts.append(Advanced(index, draw.draw(counts), draw.draw(counts), finished, label, *signals))
    codes, known = frames.FactCodes(), [Probed(0, None, 9, 812)]  # a fact of another episode
    assert codes.codes_of(known) == [0]
    turn = frames.encode_turn(3, asked, Round(carried_out, facts), codes)
    assert turn[0] == 3
    assert (turn[1] == frames.FACTS) == (carried_out == asked)
    learnt: list[Fact] = []
    news = codes.new_facts()
    assert frames.decode_facts(news, 0, learnt) == len(news)
    assert learnt[:1] == known
    assert frames.decode_turn(turn, 0, asked, learnt) == (carried_out, facts, len(turn))
    again = frames.encode_turn(3, asked, Round(carried_out, facts), codes)
    ends = sum(isinstance(fact, Advanced) and fact.finished for fact in facts)
    news = codes.new_facts()
    assert news[0] == ends  # no other fact is sent twice
    assert frames.decode_facts(news, 0, learnt) == len(news)
    assert frames.decode_turn(again, 0, asked, learnt) == (carried_out, facts, len(again))


def test_a_fact_twice_in_a_round_is_sent_once() -> None:
    codes, step = frames.FactCodes(), Advanced(0, 1, 10, False)
    assert codes.codes_of([step, step]) == codes.codes_of([step, step]) == [0, 0]
    assert codes.new_facts()[0] == 1


def test_a_process_forgets_all_facts_once_it_knows_many() -> None:
    codes, learnt, step = frames.FactCodes(), list[Fact](), Advanced(0, 1, 10, False)
    most = resent = 0
    for number in range(4 * frames.MAX_KNOWN // 1000):
        round_ = Round([], [step, *(Probed(0, None, 1 + number % 40) for _ in range(999))])
        turn = frames.encode_turn(3, [], round_, codes)
        news = codes.new_facts()
        resent += step not in learnt or news[0] < 0
        assert frames.decode_facts(news, 0, learnt) == len(news)
        assert frames.decode_turn(turn, 0, [], learnt)[1] == round_.facts
        most = max(most, len(learnt))
    assert most < frames.MAX_KNOWN + 1000
    assert resent == 4
    assert sys.getrefcount(step) < 10


def test_facts_that_end_a_branch_are_not_kept_alive() -> None:
    codes, end, step = frames.FactCodes(), Advanced(0, 1, 10, True, 0), Advanced(0, 1, 10, False)
    before = [sys.getrefcount(fact) for fact in (end, step)]
    codes.codes_of([end, step])
    assert [sys.getrefcount(fact) for fact in (end, step)] == [before[0], before[1] + 1]


@given(
    beta=st.floats(0, 1), cap=st.none() | st.integers(1, 1 << 50), has_probes=st.booleans(), has_pauses=st.booleans()
)
def test_an_encoded_start_of_an_episode_decodes_to_the_same_beta_and_limits(
    beta: float, cap: int | None, has_probes: bool, has_pauses: bool
) -> None:
    limits = Limits(512, 64, 4096, 20, cap, has_probes, has_pauses)
    turn = frames.encode_begin(9, beta, limits)
    assert turn[:2] == [9, frames.BEGIN]
    assert frames.decode_begin(turn, 2) == (beta, limits, len(turn))


@given(numbers=st.lists(st.integers(-3, 40), max_size=12), most=st.integers(0, 5))
def test_any_numbers_decode_to_a_bounded_decision_or_are_refused(numbers: list[int], most: int) -> None:
    try:
        decided, at = frames.decode_decision(numbers, 0, most)
    except BadFrame:
        return
    assert 0 < at <= len(numbers)
    assert decided is None or isinstance(decided, str) or len(decided) <= most


@given(
    numbers=st.lists(st.integers(-3, 5) | actions.map(frames.encode_action), max_size=12),
    count=st.integers(0, 4),
    most=st.integers(0, 5),
)
def test_decisions_decode_together_as_they_do_one_by_one(numbers: list[int], count: int, most: int) -> None:
    try:
        decisions, at = frames.decode_decisions(numbers, 0, count, most)
    except BadFrame as error:
        with pytest.raises(BadFrame, match=re.escape(str(error))):
            decode_one_by_one(numbers, count, most)
    else:
        assert (decisions, at) == decode_one_by_one(numbers, count, most)


def decode_one_by_one(numbers: list[int], count: int, most: int) -> tuple[list[Decision], int]:
    at, decisions = 0, list[Decision]()
    for _ in range(count):
        decision, at = frames.decode_decision(numbers, at, most)
        decisions.append(decision)
    return decisions, at


def test_frames_over_the_size_limit_are_refused() -> None:
    assert frames.unpack(frames.pack([1, -1])[frames.HEADER.size :]) == [1, -1]
    with pytest.raises(BadFrame, match="a frame of 1048584 bytes"):
        frames.pack([0] * ((1 << 17) + 1))
    for length in (4, (1 << 20) + 8, 1 << 31):
        with pytest.raises(BadFrame, match=f"claims {length} bytes"):
            frames.body_size(frames.HEADER.pack(length))


def test_control_characters_in_messages_are_replaced_and_messages_cut() -> None:
    assert frames.printable("\x1b[2Jé\n") == "\ufffd[2Jé\ufffd"
    assert frames.decode_text([2, 0x110000, 65], 0, 9) == ("?A", 3)
    assert frames.decode_decision(frames.encode_complaint("x" * 900), 0, 9)[0] == "x" * 500


def test_wider_limits_put_fewer_episodes_into_one_message() -> None:
    assert episodes_per_message(Limits(1, 64)) == 128
    assert episodes_per_message(Limits(1, 1024)) == 9
    assert episodes_per_message(Limits(1, 1 << 20)) == 1


def test_new_facts_of_every_branch_fit_into_one_message() -> None:
    for width in (8, 64, 500, 4096):
        facts: list[Fact] = []
        for index in range(width):
            facts += [Advanced(index, 1, 10, False, None, 900, index % 1000), Probed(index, 1, 9, index % 1000)]
        decided = [action for index in range(width) for action in (advance(index), probe(index))]
        message = [frames.STEP, 1]
        codes = frames.FactCodes()
        turns: list[int] = []
        for seat in range(episodes_per_message(Limits(1, width))):
            turns += frames.encode_turn(seat, [], Round(decided, [replace(fact) for fact in facts]), codes)
        assert frames.pack([*message, *codes.new_facts(), *turns])


@pytest.mark.parametrize("width", [1, 8, 64, 500, 4096])
def test_the_largest_legal_rounds_of_new_facts_fit_into_one_message(width: int) -> None:
    limits, codes, turns = Limits(1, width), frames.FactCodes(), list[int]()
    decided = [advance(number % width) for number in range(most_actions(limits))]
    for seat in range(episodes_per_message(limits)):
        facts: list[Fact] = [Advanced(action.branch, 1, 10, False, None, 900, 800) for action in decided]
        turns += frames.encode_turn(seat, decided, Round(decided, facts), codes)
    assert frames.pack([frames.STEP, 1, *codes.new_facts(), *turns], frames.MAX_OWNER_BYTES)


# The sandbox process's loop, run as a thread of the test process


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Serve the sandbox loop in a thread and yield the owner's end of its socket."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(process, "CHANNEL", theirs.fileno())
    serving = threading.Thread(target=process.serve)
    serving.start()
    with ours:
        assert ours.recv(64) == frames.pack([frames.READY])
        yield ours
    serving.join()
    theirs.close()


def ask(owner: socket.socket, *numbers: int) -> list[int]:
    data = frames.pack(numbers)
    for part in (data[:3], data[3:]):
        owner.sendall(part)
    size = frames.body_size(owner.recv(frames.HEADER.size, socket.MSG_WAITALL))
    return frames.unpack(owner.recv(size, socket.MSG_WAITALL))


def load(owner: socket.socket, source: str) -> str:
    reply = ask(owner, frames.LOAD, 1, *frames.encode_text("mine"), *frames.encode_text(source))
    assert reply[0] == 1
    return frames.decode_text(reply, 1, 500)[0]


def test_one_process_plays_several_episodes_at_once(owner: socket.socket) -> None:
    assert load(owner, STEPPING) == ""
    begin = [number for seat in (0, 4) for number in frames.encode_begin(seat, 0.5, LIMITS)]
    opening = [3, *map(frames.encode_action, [branch()] * 3)]
    assert ask(owner, frames.STEP, 2, 0, *begin) == [2, *opening, *opening]
    facts: list[Fact] = [Advanced(0, 1, 10, False), Advanced(1, 1, 4, True, 0), Advanced(2, 1, 10, False)]
    codes = frames.FactCodes()
    turn = frames.encode_turn(4, [branch()] * 3, Round([branch()] * 3, facts), codes)
    assert ask(owner, frames.STEP, 3, *codes.new_facts(), *turn) == [
        3,
        2,
        frames.encode_action(advance(0)),
        frames.encode_action(advance(2)),
    ]
    cut = frames.encode_turn(0, [branch()] * 3, Round([branch()] * 2, facts[:2]), codes)
    assert ask(owner, frames.STEP, 4, *codes.new_facts(), *cut) == [4, 1, frames.encode_action(advance(0))]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise SystemExit", "mine.py: SystemExit: "),
        ("class Leave(BaseException): ...\nraise Leave", "Leave"),
        ("x = 1", "mine.py: a controller file must have exactly one class with a decide method, not none"),
    ],
)
def test_a_process_reports_why_a_file_cannot_be_loaded(owner: socket.socket, source: str, message: str) -> None:
    assert load(owner, source) == message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (HEAD + "        raise ValueError('no')", "Mine raised ValueError: no"),
        (HEAD + "        return [advance(-1)]", "advance(): there is no branch -1; they are numbered from 0"),
        (HEAD + "        return 7", "Mine did not return a list of actions but 7; return [branch()], for example"),
        (HEAD + "        return 'branch'", "Mine did not return a list of actions but 'branch'; return [branch()]"),
        (
            HEAD + "        return branch()",
            "Mine did not return a list of actions but a value of type Action; return [branch()]",
        ),
        (
            HEAD + "        return [branch(), 'branch']",
            "Mine did not return a list of actions: entry 1 is 'branch'; make each with branch(), advance(), probe()",
        ),
        (
            HEAD + "        return (branch() for _ in range(2))",
            "Mine did not return a list of actions but a value of type generator; return [branch()], for example",
        ),
        (HEAD + "        return [branch]", "entry 0 is a value of type function; make each with branch()"),
        (HEAD.replace("self.beta = beta", "1 / 0") + "        return []", "its constructor raised ZeroDivisionError"),
    ],
)
def test_a_process_reports_the_failure_of_its_controller(owner: socket.socket, source: str, message: str) -> None:
    assert load(owner, source) == ""
    reply = ask(owner, frames.STEP, 2, 0, *frames.encode_begin(0, 0.5, LIMITS))
    complaint, _ = frames.decode_decision(reply, 1, 9)
    assert isinstance(complaint, str)
    assert message in complaint


CHANGING = HEAD + (
    "        self.list = self.list if state.width else [branch(), branch()]\n"
    "        if state.rounds == 1: self.list[:] = [advance(0), advance(1)]\n"
    "        if state.rounds == 3: self.list.pop()\n"
    "        return self.list\n"
)
"""Source of a controller that returns the same list, whose actions it changes."""


def test_a_repeated_decision_is_one_number_and_a_changed_list_is_not_repeated(owner: socket.socket) -> None:
    assert load(owner, CHANGING) == ""
    opening, both = [branch(), branch()], [advance(0), advance(1)]
    facts: list[Fact] = [Advanced(0, 1, 10, False), Advanced(1, 1, 10, False)]
    codes, before = frames.FactCodes(), list[Fact]()
    replies = [ask(owner, frames.STEP, 2, 0, *frames.encode_begin(0, 0.5, LIMITS))]
    for number, decided in enumerate((opening, both, both), 3):
        turn = frames.encode_turn(0, decided, Round(decided, facts), codes, before)
        before = facts
        replies.append(ask(owner, frames.STEP, number, *codes.new_facts(), *turn))
    two = [frames.encode_action(action) for action in both]
    assert replies == [[2, *frames.encode_actions(opening)], [3, 2, *two], [4, frames.UNCHANGED], [5, 1, two[0]]]


# Real sandbox processes


@pytest.fixture(scope="module")
def sandbox_spawner() -> Iterator[SandboxSpawner]:
    made = SandboxSpawner()
    yield made
    made.close()


@linux
@pytest.mark.parametrize(("module", "function"), [(os, "pidfd_open"), (socket, "socketpair")])
def test_a_machine_without_descriptors_disturbs_a_start_and_leaves_no_process(
    sandbox_spawner: SandboxSpawner, monkeypatch: pytest.MonkeyPatch, module: Any, function: str
) -> None:
    sandbox_spawner.spawn().close()
    assert sandbox_spawner._zygote is not None
    zygote = sandbox_spawner._zygote.pid

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(module, function, fail)
        with pytest.raises(MachineDisturbed, match="cannot start a sandbox process: Too many open files"):
            sandbox_spawner.spawn()
    assert Path(f"/proc/{zygote}/task/{zygote}/children").read_text() == ""
    assert sandbox_spawner.proof is None or sandbox_spawner.proof.sealed
    sandbox_spawner.spawn().close()


@linux
def test_a_proof_that_lacks_descriptors_is_made_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(SandboxSpawner()) as made:

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patched:
            patched.setattr("controllers.sandbox.spawner.subprocess.Popen", fail)
            with pytest.raises(MachineDisturbed, match="Too many open files"):
                made.spawn()
            assert made.proof is None
            assert "Too many open files" in str(made.check().reason)
        made.proof = None
        made.spawn().close()


def controller(sandbox_spawner: SandboxSpawner, source: str, hard_s: float = 5.0) -> SandboxedController:
    worker = sandbox_spawner.spawn(hard_s)
    worker.load(Spec("mine", source))
    return SandboxedController(worker, 0.5)


@linux
@pytest.mark.parametrize("waits", [True, False])
async def test_a_sandboxed_controller_plays_an_episode_like_any_controller(
    sandbox_spawner: SandboxSpawner, waits: bool
) -> None:
    sealed = controller(sandbox_spawner, STEPPING)
    state = State(Limits(10, branch_tokens=200, max_tokens=150))  # a cap cuts its rounds short
    if waits:
        await run_episode(sealed, ScriptedEnvironment(CHAINS, 10), state)
    else:
        while state.stop is None:
            decided = state.affordable(sealed.decide(state))
            if not decided:
                break
            state.apply(decided, await ScriptedEnvironmentOf(state).execute(decided))
    assert state.spent <= 150
    assert state.rounds > 3
    sealed.close()
    assert not sealed.handle.alive


class ScriptedEnvironmentOf:
    """Environment in which every advance yields one interval of ten tokens and no branch finishes."""

    def __init__(self, state: State) -> None:
        self.state = state

    async def execute(self, decided: object) -> list[Fact]:
        assert isinstance(decided, list)
        opened = iter(range(self.state.width, 64))
        return [
            Advanced(next(opened) if action.verb is Verb.BRANCH else action.branch, 1, 10, False) for action in decided
        ]


@linux
def test_a_sandboxed_controller_that_joins_mid_episode_is_refused(sandbox_spawner: SandboxSpawner) -> None:
    sealed, state = controller(sandbox_spawner, STEPPING), State(LIMITS)
    state.apply([branch()], [Advanced(0, 1, 10, False)])
    state.apply([advance(0)], [Advanced(0, 1, 10, False)])
    with pytest.raises(ControllerError, match="must see every round of its episode"):
        sealed.decide(state)
    sealed.close()


@linux
def test_a_file_that_fails_to_load_is_reported_and_its_process_ended(sandbox_spawner: SandboxSpawner) -> None:
    worker = sandbox_spawner.spawn()
    with pytest.raises(BadController, match=r"mine\.py: ModuleNotFoundError: No module named 'json'"):
        worker.load(Spec("mine", "import json"))
    assert not worker.alive
    assert worker.close() is None
    with pytest.raises(BoundaryViolation, match="the process has been closed"):
        worker.decide([frames.encode_begin(0, 0.5, LIMITS)], 9)


def test_a_boundary_violation_survives_pickling() -> None:
    error = BoundaryViolation(Boundary.LATE, "it took longer")
    again = pickle.loads(pickle.dumps(error))
    assert (again.boundary, str(again)) == (Boundary.LATE, "it took longer (late)")


@linux
def test_every_allowed_module_can_be_imported_in_the_sandbox(sandbox_spawner: SandboxSpawner) -> None:
    allowed = "math, statistics, collections, itertools, dataclasses, typing, heapq, bisect, functools"
    lines = f"import {allowed}\nimport controllers.voting, controllers.dial, collections.abc\n"
    sealed = controller(sandbox_spawner, lines + STEPPING)
    assert len(sealed.decide(State(LIMITS))) == 3
    sealed.close()


@linux
def test_hashes_and_random_numbers_are_equal_in_every_process() -> None:
    source = (
        HEAD
        + '        import random\n        raise ValueError(f\'{hash("β")} {random.random()} {list({"a", "b", "c"})}\')'
    )
    messages = set()
    for _ in range(2):
        made = SandboxSpawner()
        for _ in range(2):
            sealed = controller(made, source)
            with pytest.raises(ControllerError) as raised:
                sealed.decide(State(LIMITS))
            messages.add(str(raised.value))
            sealed.close()
        made.close()
    assert len(messages) == 1


@linux
async def test_cancelling_a_decision_ends_its_process(sandbox_spawner: SandboxSpawner) -> None:
    sealed = controller(sandbox_spawner, HEAD + "        while True: pass", hard_s=60)
    deciding = asyncio.create_task(sealed.decide_later(State(LIMITS)))
    await asyncio.sleep(0)
    deciding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deciding
    assert not sealed.handle.alive
    sealed.close()


@linux
@pytest.mark.parametrize("later", [True, False])
async def test_a_slow_decision_is_counted_and_a_late_one_is_a_boundary_violation(
    sandbox_spawner: SandboxSpawner, later: bool
) -> None:
    busy = (
        HEAD
        + "        n = 10**6 * (4 if state.rounds == 0 else 10**6)\n        while n: n -= 1\n        return [branch()]"
    )
    sealed, state = controller(sandbox_spawner, busy, hard_s=3.0 if later else 5.0), State(LIMITS)
    if later:
        await sealed.decide_later(state)
        assert sealed.handle.slow == 1  # four million steps take longer than 50 ms anywhere
    else:
        sealed.handle.hard_s = 5.0
        sealed.decide(state)
        sealed.handle.hard_s = 1.0
    state.apply([branch()], [Advanced(0, 1, 10, False)])
    with pytest.raises(BoundaryViolation, match="it took longer than") as crossed:
        await sealed.decide_later(state) if later else sealed.decide(state)
    assert crossed.value.boundary is Boundary.LATE
    with pytest.raises(BoundaryViolation, match="it took longer than"):  # the failure is remembered
        sealed.decide(State(LIMITS))


@linux
def test_a_process_that_exits_fails_its_current_and_later_episodes(sandbox_spawner: SandboxSpawner) -> None:
    source = STEPPING.replace(
        "        if not", "        if state.rounds == 2: (lambda f: f(f))(lambda f: exit_now())\n        if not"
    )
    source = "import posix\ndef exit_now(): posix._exit(3)\n" + source
    workers = [sandbox_spawner.spawn(5.0), sandbox_spawner.spawn(5.0)]
    for worker in workers:
        worker.load(Spec("mine", source))

    def episode(number: int):  # type: ignore[no-untyped-def]
        async def run(remote):  # type: ignore[no-untyped-def]
            state = State(LIMITS)
            try:
                await run_episode(remote, ScriptedEnvironment(CHAINS, 10), state)
            except BoundaryViolation as error:
                return number, state.rounds, error.boundary
            return number, state.rounds, None

        return run

    ended = run_together(workers, 0.5, LIMITS, [episode(number) for number in range(300)])
    assert [number for number, _, _ in ended] == list(range(300))
    assert {boundary for _, _, boundary in ended} == {Boundary.DEAD}
    assert sorted({rounds for _, rounds, _ in ended}) == [0, 2]


RESTLESS = (
    """
import sys
child = sys.modules["controllers.sandbox.process"]
write = child._write
def spin(numbers):
    write(numbers)
    while True: pass
"""
    + HEAD
    + "        child._write = spin\n        return [branch()]"
)
"""Source of a controller that keeps computing after it has answered."""


def state_of(process: int) -> str:
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@linux
@pytest.mark.parametrize("later", [True, False])
async def test_a_live_process_is_stopped_between_requests(sandbox_spawner: SandboxSpawner, later: bool) -> None:
    sealed, state = controller(sandbox_spawner, RESTLESS), State(LIMITS)
    process = sealed.handle.process
    while state_of(process) != "T":  # stopped once its file is loaded
        pass
    await sealed.decide_later(state) if later else sealed.decide(state)
    while state_of(process) != "T":
        pass
    with ProcessUsageReader(process) as meter:
        before = meter.read()
        while meter.read().since(before).wall < 0.05:
            assert meter.read().cpu == before.cpu
    sealed.close()


@linux
def test_a_process_that_is_stopped_between_200_requests_keeps_working(sandbox_spawner: SandboxSpawner) -> None:
    sealed, state = controller(sandbox_spawner, STEPPING), State(LIMITS)
    for _ in range(200):
        decided = sealed.decide(state)
        state.apply(decided, [Advanced(at, 1, 10, False) for at in range(len(decided))])
    assert sealed.handle.alive
    sealed.close()


@linux
def test_computing_between_two_requests_is_a_boundary_violation(sandbox_spawner: SandboxSpawner) -> None:
    """A replay process is never stopped, so it can compute while its owner does not read."""
    worker = sandbox_spawner.spawn(5.0, Clock.CPU)
    worker.load(Spec("mine", RESTLESS))
    sealed, state = SandboxedController(worker, 0.5), State(LIMITS)
    decided = sealed.decide(state)
    while worker._idle_s is not None and worker._meter.read_cpu() - worker._idle_s <= handles.UNASKED_S:
        pass
    state.apply(decided, [Advanced(0, 1, 10, False)])
    with pytest.raises(BoundaryViolation, match=r"it computed for 0\... s while no decision was requested") as crossed:
        sealed.decide(state)
    assert crossed.value.boundary is Boundary.UNASKED


DOUBLING = (
    """
import sys
child = sys.modules["controllers.sandbox.process"]
def write_twice(numbers):
    child.os.write(child.CHANNEL, child.pack(numbers) * 2)
"""
    + HEAD
    + "        child._write = write_twice\n        return [branch()]"
)
"""Source of a controller that sends its reply twice."""


@linux
def test_two_replies_to_a_request_are_a_boundary_violation(sandbox_spawner: SandboxSpawner) -> None:
    sealed, state = controller(sandbox_spawner, DOUBLING), State(LIMITS)
    state.apply(sealed.decide(state), [Advanced(0, 1, 10, False)])
    with pytest.raises(BoundaryViolation, match="it replied more than once") as crossed:
        sealed.decide(state)
    assert crossed.value.boundary is Boundary.FRAME


@linux
def test_live_processes_run_at_lower_priority_than_their_owner(sandbox_spawner: SandboxSpawner) -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    live, replayed = sandbox_spawner.spawn(), sandbox_spawner.spawn(clock=Clock.CPU)
    assert os.getpriority(os.PRIO_PROCESS, live.process) == min(19, mine + handles.NICE)
    assert os.getpriority(os.PRIO_PROCESS, replayed.process) == mine
    for worker in (live, replayed):
        worker.close()


@linux
def test_a_process_that_cannot_be_sealed_is_not_the_controllers_fault(sandbox_spawner: SandboxSpawner) -> None:
    process, channel, zygote = sandbox_spawner._fork(SPAWN, ALL_LAYERS)
    ours, theirs = socket.socketpair()
    theirs.sendall(frames.pack(frames.encode_text("landlock: no such thing")))
    worker = SandboxHandle(process, ours, lambda child: sandbox_spawner._reap(child, zygote))
    with theirs, channel, pytest.raises(MachineDisturbed, match="sandbox process: landlock: no such thing"):
        worker.load(Spec("cmc"))


# The proof


@linux
def test_the_seal_is_proven_at_first_and_again_after_a_fixed_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spawner, "PROVE_EVERY", 5)
    proven: list[Proof] = []
    made = SandboxSpawner()
    check = made._prove

    def counted() -> Proof:
        proven.append(check())
        return proven[-1]

    monkeypatch.setattr(made, "_prove", counted)
    for _ in range(11):
        made.spawn().close()
    assert len(proven) == 3
    monkeypatch.setattr(spawner, "prove", lambda attempt: Proof([proof.Trial("fork", ALL_LAYERS, False, "it could")]))
    for _ in range(4):
        made.spawn().close()
    for _ in range(2):
        with pytest.raises(SandboxUnavailable, match="cannot seal controllers: fork: it could; run `autotts doctor`"):
            made.spawn()
    assert len(proven) == 4
    made.close()


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed on Linux only")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_start_leaves_no_socket_open(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise error

    made = SandboxSpawner()
    made.proof = prove(lambda _: AttemptResult(attempts.REFUSED << 8, "assumed"))
    monkeypatch.setattr("controllers.sandbox.spawner.subprocess.Popen", interrupted)
    before = os.listdir("/proc/self/fd")
    with pytest.raises((KeyboardInterrupt, SandboxUnavailable)):
        made.spawn()
    assert os.listdir("/proc/self/fd") == before


def kill_zygote(made: SandboxSpawner) -> None:
    assert made._zygote is not None
    made._zygote.kill()
    made._zygote.wait()


def wait_for_end(worker: SandboxHandle) -> None:
    assert select.select([worker._handle], [], [], 30)[0], "the process has not ended"


@linux
@pytest.mark.parametrize("later", [True, False])
async def test_processes_whose_zygote_dies_raise_machine_disturbed(later: bool) -> None:
    made = SandboxSpawner()
    idle, busy = controller(made, STEPPING), controller(made, HEAD + "        while True: pass", hard_s=60)
    if later:
        deciding = asyncio.create_task(busy.decide_later(State(LIMITS)))
        await asyncio.sleep(0)
        kill_zygote(made)
        with pytest.raises(MachineDisturbed, match="the zygote process has ended"):
            await deciding
    else:
        busy.handle.begin([frames.encode_begin(0, 0.5, LIMITS)], 9)
        kill_zygote(made)
        with pytest.raises(MachineDisturbed, match="the zygote process has ended"):
            busy.handle.finish()
    wait_for_end(idle.handle)
    assert not idle.handle.alive
    with pytest.raises(MachineDisturbed):
        idle.decide(State(LIMITS))
    made.close()


@linux
def test_a_dead_zygote_is_replaced_and_closing_old_processes_leaves_the_new_one_alive() -> None:
    made = SandboxSpawner()
    old = made.spawn()
    kill_zygote(made)
    wait_for_end(old)
    new = made.spawn()
    first = made._zygote
    assert old.close() is None  # its exit status was lost with its zygote
    new.load(Spec("cmc"))
    made.spawn().close()
    assert made._zygote is first
    assert new.alive
    new.close()
    made.close()


@linux
def test_an_impossible_request_does_not_end_the_zygote(sandbox_spawner: SandboxSpawner) -> None:
    worker = sandbox_spawner.spawn()
    assert sandbox_spawner._zygote is not None
    assert (
        sandbox_spawner._reap(os.getpid(), sandbox_spawner._zygote.pid) is None
    )  # the test process is not a child of the zygote
    worker.load(Spec("cmc"))
    worker.close()


@linux
def test_a_process_killed_before_it_loads_a_controller_is_closed(sandbox_spawner: SandboxSpawner) -> None:
    worker = sandbox_spawner.spawn()
    worker.kill("the pool is stopped")
    with pytest.raises(MachineDisturbed, match="the pool is stopped"):
        worker.load(Spec("cmc"))
    assert worker._channel.fileno() < 0
    assert worker._handle < 0


@linux
def test_an_idle_process_killed_from_outside_raises_machine_disturbed(sandbox_spawner: SandboxSpawner) -> None:
    sealed = controller(sandbox_spawner, STEPPING)
    os.kill(sealed.handle.process, signal.SIGKILL)
    wait_for_end(sealed.handle)
    assert not sealed.handle.alive
    with pytest.raises(MachineDisturbed, match="killed from outside while it was idle"):
        sealed.decide(State(LIMITS))
    with pytest.raises(MachineDisturbed, match="killed from outside while it was idle"):  # the failure is remembered
        sealed.decide(State(LIMITS))


async def decide_in_stalled_loop(sandbox_spawner: SandboxSpawner, source: str, limits: Limits) -> Sequence[Action]:
    """Return a decision of an event loop that is stalled from the request until after the deadline."""
    for _ in repeat(None):
        sealed = controller(sandbox_spawner, source, hard_s=0.2)
        with closing(sealed):
            deciding = asyncio.create_task(sealed.decide_later(State(limits)))
            await asyncio.sleep(0)  # the request has been sent
            if deciding.done():  # the answer came before the loop could stall
                continue
            asked = time.monotonic()
            assert select.select([sealed.handle._channel], [], [], 30)[0]
            while time.monotonic() < asked + 0.3:  # simulates a stalled event loop
                pass
            return await deciding
    raise AssertionError


@linux
async def test_an_answer_that_is_ready_is_accepted_after_a_stalled_event_loop(sandbox_spawner: SandboxSpawner) -> None:
    assert len(await decide_in_stalled_loop(sandbox_spawner, STEPPING, LIMITS)) == 3


@linux
async def test_a_large_answer_that_waits_for_its_reader_is_not_late(sandbox_spawner: SandboxSpawner) -> None:
    """The process blocks until its owner reads; that time does not count against it."""
    source = HEAD + "        return [branch()] * 100_000"
    assert len(await decide_in_stalled_loop(sandbox_spawner, source, Limits(10, 1 << 14))) == 100_000


@linux
async def test_a_process_without_processor_time_raises_machine_disturbed(sandbox_spawner: SandboxSpawner) -> None:
    """A sandbox process that gets no processor time raises MachineDisturbed, not a boundary violation.

    It shares one processor with a process that has three hundred times its weight.

    Other work on the machine may still give it some time, so one of a few tries must do.
    """
    here = min(os.sched_getaffinity(0))
    spin = "print(flush=True)\nwhile True: pass"
    busy = await asyncio.create_subprocess_exec(sys.executable, "-c", spin, stdout=asyncio.subprocess.PIPE)
    os.sched_setaffinity(busy.pid, {here})
    assert busy.stdout is not None
    await busy.stdout.readline()
    ended: list[Exception] = []
    try:
        while len(ended) < 8 and not any(isinstance(error, MachineDisturbed) for error in ended):
            sealed = controller(sandbox_spawner, HEAD + "        while True: pass", hard_s=0.25)
            os.sched_setaffinity(sealed.handle.process, {here})
            os.sched_setscheduler(sealed.handle.process, os.SCHED_IDLE, os.sched_param(0))
            with pytest.raises((BoundaryViolation, MachineDisturbed)) as caught:
                await sealed.decide_later(State(LIMITS))
            ended.append(caught.value)
    finally:
        busy.kill()
        await busy.communicate()
    assert "the machine is too busy" in str(ended[-1])


def test_a_late_answer_is_blamed_on_the_controller_or_on_the_machine_by_its_usage() -> None:
    def late(clock: Clock, seconds: float, **usage: float) -> type[Exception]:
        with ProcessUsageReader(os.getpid()) as meter:
            return type(explain_late(Deadline(meter, clock, seconds), ProcessUsage(**usage)))

    assert late(Clock.WALL, 0.25, wall=0.25, cpu=0.25) is BoundaryViolation
    assert (
        late(Clock.WALL, 0.25, wall=0.25, cpu=0.03, queued=0.22) is BoundaryViolation
    )  # 30 ms of processor time are enough for an ordinary decision
    assert late(Clock.WALL, 0.25, wall=0.25, cpu=0.0) is BoundaryViolation  # it slept
    assert late(Clock.WALL, 0.25, wall=0.25, cpu=0.01, queued=0.24) is MachineDisturbed
    assert late(Clock.CPU, 0.25, wall=9.0, cpu=0.25, queued=8.75) is BoundaryViolation
    assert late(Clock.CPU, 0.25, wall=9.0, cpu=0.1, queued=2.0) is BoundaryViolation
    assert late(Clock.CPU, 0.25, wall=120.0, cpu=0.1, queued=119.9) is MachineDisturbed


class ScriptedReader(ProcessUsageReader):
    """Gives readings that a test wrote down."""

    def __init__(self, *readings: ProcessUsage) -> None:
        self._readings = iter(readings)

    def read(self) -> ProcessUsage:
        """Return the next reading."""
        return next(self._readings)


@pytest.mark.parametrize(
    ("stopped", "ended", "fault"),
    [
        # It slept for 2 s, and then ran and waited for as long as it took to end.
        (ProcessUsage(12.002, 1.001, 0.0), ProcessUsage(12.006, 1.003, 0.0015), BoundaryViolation),
        (ProcessUsage(12.0, 1.0, 0.0), ProcessUsage(12.5, 1.003, 0.49), BoundaryViolation),
        # It waited for a processor for 2 s, which the kernel adds when the wait has ended.
        (ProcessUsage(12.0, 1.0, 0.0), ProcessUsage(12.5, 1.003, 2.497), MachineDisturbed),
        (ProcessUsage(12.0, 1.0, 0.0), ProcessUsage(12.004, 1.001, 2.002), MachineDisturbed),
    ],
)
def test_the_time_that_a_killed_process_takes_to_end_excuses_nothing(
    stopped: ProcessUsage, ended: ProcessUsage, fault: type[Exception]
) -> None:
    deadline = Deadline(ScriptedReader(ProcessUsage(10.0, 1.0, 0.0), stopped, ended), Clock.CPU, 0.2)
    deadline.stop()
    assert type(explain_late(deadline, deadline.usage())) is fault


def test_a_python_that_does_not_start_counts_as_not_sealed() -> None:
    for python in ("/nowhere/python", "/bin/true"):
        result = SandboxSpawner(python=python).check()
        assert not result.sealed
        assert "does not start" in str(result.lacking) or "failed" in str(result.lacking)


def test_only_a_refusal_or_sigsys_proves_that_an_attempt_failed() -> None:
    def ended(status: int) -> bool:
        return proof._judge(AttemptResult(status, "why"))[0]

    assert ended(31)  # SIGSYS
    assert ended(attempts.REFUSED << 8)
    for code in (attempts.ESCAPED, attempts.UNSURE, attempts.NOT_SEALED, 1):
        assert not ended(code << 8)
    assert not ended(9)
    assert not ended(11)


def test_the_attempts_cover_every_layer_alone_and_all_layers_together() -> None:
    trials = [proof.Trial(one.what, one.layers, True, "") for one in attempts.ATTEMPTS]
    result = Proof(trials)
    assert result.sealed
    assert all(result.of(layer) for layer in Layer)
    together = {trial.what for trial in result.together}
    assert together >= {"read a file", "open a socket", "fork", "execute", "call as x32", "raise a limit"}
    assert Proof([]).lacking == "no attempt was made"
    assert [level.rank for level in SandboxLevel] == [2, 1, 0, 0]


@linux
def test_every_attempt_succeeds_in_an_unsealed_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a refusal would prove nothing. Two may fail anyway: without privileges, and without x32."""
    made = SandboxSpawner()
    bare = [one._replace(layers=Layer(0)) for one in attempts.ATTEMPTS]
    monkeypatch.setattr(spawner, "ATTEMPTS", bare)
    could = {one.what for at, one in enumerate(bare) if made._attempt(at).status == attempts.ESCAPED}
    made.close()
    assert could >= {one.what for one in bare} - {"become root", "call as x32"}


@linux
@pytest.mark.parametrize("wait", ["posix.read(3, 1)", "lock.acquire()"])
def test_a_sleeping_process_is_late_by_either_clock(sandbox_spawner: SandboxSpawner, wait: str) -> None:
    """A sleeping process uses no processor time, but nothing kept it from running."""
    source = f"import posix, _thread\nlock = _thread.allocate_lock()\nlock.acquire()\n{HEAD}        {wait}"
    for clock in Clock:
        worker = sandbox_spawner.spawn(0.2, clock)
        worker.load(Spec("mine", source))
        with pytest.raises(BoundaryViolation) as crossed:
            SandboxedController(worker, 0.5).decide(State(LIMITS))
        assert crossed.value.boundary is Boundary.LATE
