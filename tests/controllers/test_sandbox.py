"""The sandbox's parts: frames both ways, children that end, a seal that is proven again and again."""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

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
from controllers.sandbox.frames import BadFrame
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.process_usage import ProcessUsage, ProcessUsageReader
from controllers.sandbox.proof import AttemptResult, Proof, SandboxLevel
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
labels = st.none() | st.integers(0, 1 << 20)
actions = st.one_of(
    st.builds(branch, st.sampled_from([1, 2, 99, TO_END])),
    st.builds(advance, counts, st.sampled_from([1, 2, 99, TO_END])),
    st.builds(probe, counts),
    st.builds(prune, counts),
    st.builds(answer, labels),
)


@given(action=actions)
def test_an_action_survives_its_number(action: Action) -> None:
    assert frames.decode_action(frames.encode_action(action)) == action


@given(number=st.integers(-(1 << 63), (1 << 63) - 1))
def test_a_number_is_one_action_or_none(number: int) -> None:
    try:
        action = frames.decode_action(number)
    except BadFrame:
        return
    assert frames.encode_action(action) == number


@pytest.mark.parametrize("action", [answer(-1), Action(Verb.PROBE, 1 << 40), Action(Verb.BRANCH, 7, 1)])
def test_actions_nobody_could_mean_have_no_number(action: Action) -> None:
    with pytest.raises(BadFrame):
        frames.decode_action(frames.encode_action(action))


@given(
    asked=st.lists(actions.filter(lambda action: action.verb is not Verb.ANSWER), max_size=8),
    cut=st.integers(0, 8),
    draw=st.data(),
)
def test_a_round_survives_its_turn(asked: list[Action], cut: int, draw: st.DataObject) -> None:
    carried_out, width = asked[:cut], 5
    facts: list[Fact] = []
    opened = width
    for action in carried_out:
        index = opened if action.verb is Verb.BRANCH else action.branch
        opened += action.verb is Verb.BRANCH
        if action.verb is Verb.PROBE:
            facts.append(Probed(index, draw.draw(labels), draw.draw(counts)))
        elif action.verb is not Verb.PRUNE:
            finished = draw.draw(st.booleans())
            label = draw.draw(labels) if finished else None
            facts.append(Advanced(index, draw.draw(counts), draw.draw(counts), finished, label))
    codes, known = frames.FactCodes(), [Probed(0, None, 9)]  # of another episode
    assert codes.codes_of(known) == [0]
    turn = frames.encode_turn(3, asked, Round(carried_out, facts), codes)
    assert turn[0] == 3
    assert (turn[1] == frames.FACTS) == (carried_out == asked)
    learnt: list[Fact] = []
    news = codes.new_facts()
    assert frames.decode_facts(news, 0, learnt) == len(news)
    assert learnt[:1] == known
    assert frames.decode_turn(turn, 0, asked, learnt) == (carried_out, facts, len(turn))
    assert frames.encode_turn(3, asked, Round(carried_out, facts), codes) == turn
    assert codes.new_facts() == [0]  # nothing is told twice


@given(beta=st.floats(0, 1), cap=st.none() | st.integers(1, 1 << 50))
def test_a_beginning_survives(beta: float, cap: int | None) -> None:
    limits = Limits(512, 64, 4096, 20, cap)
    turn = frames.encode_begin(9, beta, limits)
    assert turn[:2] == [9, frames.BEGIN]
    assert frames.decode_begin(turn, 2) == (beta, limits, len(turn))


@given(numbers=st.lists(st.integers(-3, 40), max_size=12), most=st.integers(0, 5))
def test_whatever_a_child_sends_is_a_decision_or_refused(numbers: list[int], most: int) -> None:
    try:
        decided, at = frames.decode_decision(numbers, 0, most)
    except BadFrame:
        return
    assert 0 < at <= len(numbers)
    assert isinstance(decided, str) or len(decided) <= most


def test_frames_have_a_size() -> None:
    assert frames.unpack(frames.pack([1, -1])[frames.HEADER.size :]) == [1, -1]
    with pytest.raises(BadFrame, match="a frame of 1048584 bytes"):
        frames.pack([0] * ((1 << 17) + 1))
    for length in (4, (1 << 20) + 8, 1 << 31):
        with pytest.raises(BadFrame, match=f"claims {length} bytes"):
            frames.body_size(frames.HEADER.pack(length))


def test_words_cannot_command_a_terminal() -> None:
    assert frames.printable("\x1b[2Jé\n") == "\ufffd[2Jé\ufffd"
    assert frames.decode_text([2, 0x110000, 65], 0, 9) == ("?A", 3)
    assert frames.decode_decision(frames.encode_complaint("x" * 900), 0, 9)[0] == "x" * 500


def test_fewer_episodes_share_a_message_where_each_may_say_more() -> None:
    assert episodes_per_message(Limits(1, 64)) == 64
    assert episodes_per_message(Limits(1, 1024)) == 15
    assert episodes_per_message(Limits(1, 1 << 20)) == 1


# What the child does, in this process


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The other end of a child that is a thread."""
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


def test_a_child_plays_many_episodes(owner: socket.socket) -> None:
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
    ("source", "words"),
    [
        ("raise SystemExit", "mine.py: SystemExit: "),
        ("class Leave(BaseException): ...\nraise Leave", "Leave"),
        ("x = 1", "mine.py: a controller file must have exactly one class with a decide method, not none"),
    ],
)
def test_a_child_says_why_it_cannot_load(owner: socket.socket, source: str, words: str) -> None:
    assert load(owner, source) == words


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (HEAD + "        raise ValueError('no')", "Mine raised ValueError: no"),
        (HEAD + "        return [advance(-1)]", "CONTINUE: there is no branch -1; they are numbered from 0"),
        (HEAD + "        return 7", "Mine did not return a list of actions: 'int' object is not iterable"),
        (HEAD.replace("self.beta = beta", "1 / 0") + "        return []", "its constructor raised ZeroDivisionError"),
    ],
)
def test_a_child_complains_of_its_controller(owner: socket.socket, source: str, words: str) -> None:
    assert load(owner, source) == ""
    reply = ask(owner, frames.STEP, 2, 0, *frames.encode_begin(0, 0.5, LIMITS))
    assert words in frames.decode_decision(reply, 1, 9)[0]


# Children as they are


@pytest.fixture(scope="module")
def nest() -> Iterator[SandboxSpawner]:
    made = SandboxSpawner()
    yield made
    made.close()


def controller(nest: SandboxSpawner, source: str, hard_s: float = 5.0) -> SandboxedController:
    worker = nest.spawn(hard_s)
    worker.load(Spec("mine", source))
    return SandboxedController(worker, 0.5)


@linux
@pytest.mark.parametrize("waits", [True, False])
async def test_a_sealed_controller_is_an_ordinary_one(nest: SandboxSpawner, waits: bool) -> None:
    sealed = controller(nest, STEPPING)
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
    """Ten tokens an interval, for ever."""

    def __init__(self, state: State) -> None:
        self.state = state

    async def execute(self, decided: object) -> list[Fact]:
        assert isinstance(decided, list)
        opened = iter(range(self.state.width, 64))
        return [
            Advanced(next(opened) if action.verb is Verb.BRANCH else action.branch, 1, 10, False) for action in decided
        ]


@linux
def test_one_that_joins_in_the_middle_is_refused(nest: SandboxSpawner) -> None:
    sealed, state = controller(nest, STEPPING), State(LIMITS)
    state.apply([branch()], [Advanced(0, 1, 10, False)])
    state.apply([advance(0)], [Advanced(0, 1, 10, False)])
    with pytest.raises(ControllerError, match="from the first round to the last, or not at all"):
        sealed.decide(state)
    sealed.close()


@linux
def test_a_file_that_does_not_load_is_told_and_its_child_ended(nest: SandboxSpawner) -> None:
    worker = nest.spawn()
    with pytest.raises(BadController, match=r"mine\.py: ModuleNotFoundError: No module named 'json'"):
        worker.load(Spec("mine", "import json"))
    assert not worker.alive
    assert worker.close() is None
    with pytest.raises(BoundaryViolation, match="the process has been closed"):
        worker.decide([frames.encode_begin(0, 0.5, LIMITS)], 9)


def test_what_was_crossed_can_be_told_to_another_process() -> None:
    error = BoundaryViolation(Boundary.LATE, "it took longer")
    again = pickle.loads(pickle.dumps(error))
    assert (again.boundary, str(again)) == (Boundary.LATE, "it took longer (late)")


@linux
def test_what_may_be_imported_can_be(nest: SandboxSpawner) -> None:
    allowed = "math, statistics, collections, itertools, dataclasses, typing, heapq, bisect, functools"
    lines = f"import {allowed}\nimport controllers.voting, controllers.dial, collections.abc\n"
    sealed = controller(nest, lines + STEPPING)
    assert len(sealed.decide(State(LIMITS))) == 3
    sealed.close()


@linux
def test_hashes_and_chance_are_the_same_in_every_child() -> None:
    source = (
        HEAD
        + '        import random\n        raise ValueError(f\'{hash("β")} {random.random()} {list({"a", "b", "c"})}\')'
    )
    said = set()
    for _ in range(2):
        made = SandboxSpawner()
        for _ in range(2):
            sealed = controller(made, source)
            with pytest.raises(ControllerError) as raised:
                sealed.decide(State(LIMITS))
            said.add(str(raised.value))
            sealed.close()
        made.close()
    assert len(said) == 1


@linux
async def test_a_cancelled_decision_ends_its_child(nest: SandboxSpawner) -> None:
    sealed = controller(nest, HEAD + "        while True: pass", hard_s=60)
    deciding = asyncio.create_task(sealed.decide_later(State(LIMITS)))
    await asyncio.sleep(0)
    deciding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deciding
    assert not sealed.handle.alive
    sealed.close()


@linux
@pytest.mark.parametrize("later", [True, False])
async def test_slow_and_late_decisions(nest: SandboxSpawner, later: bool) -> None:
    busy = (
        HEAD
        + "        n = 10**6 * (4 if state.rounds == 0 else 10**6)\n        while n: n -= 1\n        return [branch()]"
    )
    sealed, state = controller(nest, busy, hard_s=3.0 if later else 5.0), State(LIMITS)
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
    with pytest.raises(BoundaryViolation, match="it took longer than"):  # and is remembered for it
        sealed.decide(State(LIMITS))


@linux
def test_a_killed_child_fails_its_episodes_and_those_to_come(nest: SandboxSpawner) -> None:
    source = STEPPING.replace(
        "        if not", "        if state.rounds == 2: (lambda f: f(f))(lambda f: exit_now())\n        if not"
    )
    source = "import posix\ndef exit_now(): posix._exit(3)\n" + source
    workers = [nest.spawn(5.0), nest.spawn(5.0)]
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

    ended = run_together(workers, 0.5, LIMITS, [episode(number) for number in range(150)])
    assert [number for number, _, _ in ended] == list(range(150))
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
"""It answers, and goes on computing."""


def state_of(process: int) -> str:
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@linux
@pytest.mark.parametrize("later", [True, False])
async def test_a_live_child_is_stopped_until_it_is_asked(nest: SandboxSpawner, later: bool) -> None:
    sealed, state = controller(nest, RESTLESS), State(LIMITS)
    process = sealed.handle.process
    while state_of(process) != "T":  # by the time its file was loaded
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
def test_an_honest_child_that_is_stopped_again_and_again_goes_on(nest: SandboxSpawner) -> None:
    sealed, state = controller(nest, STEPPING), State(LIMITS)
    for _ in range(200):
        decided = sealed.decide(state)
        state.apply(decided, [Advanced(at, 1, 10, False) for at in range(len(decided))])
    assert sealed.handle.alive
    sealed.close()


@linux
def test_computing_between_two_questions_is_a_boundary(nest: SandboxSpawner) -> None:
    """A child that is never stopped, as in replay, computes on while its owner looks late."""
    worker = nest.spawn(5.0, Clock.CPU)
    worker.load(Spec("mine", RESTLESS))
    sealed, state = SandboxedController(worker, 0.5), State(LIMITS)
    decided = sealed.decide(state)
    while worker._idle is not None and worker._meter.read().since(worker._idle).cpu <= handles.UNASKED_S:
        pass
    state.apply(decided, [Advanced(0, 1, 10, False)])
    with pytest.raises(BoundaryViolation, match=r"it computed for 0\... s without being asked") as crossed:
        sealed.decide(state)
    assert crossed.value.boundary is Boundary.UNASKED


@linux
def test_live_children_let_their_owner_go_first(nest: SandboxSpawner) -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    live, replayed = nest.spawn(), nest.spawn(clock=Clock.CPU)
    assert os.getpriority(os.PRIO_PROCESS, live.process) == min(19, mine + handles.NICE)
    assert os.getpriority(os.PRIO_PROCESS, replayed.process) == mine
    for worker in (live, replayed):
        worker.close()


@linux
def test_a_child_that_cannot_be_sealed_is_not_its_controllers_fault(nest: SandboxSpawner) -> None:
    process, channel, zygote = nest._fork(SPAWN, ALL_LAYERS)
    ours, theirs = socket.socketpair()
    theirs.sendall(frames.pack(frames.encode_text("landlock: no such thing")))
    worker = SandboxHandle(process, ours, lambda child: nest._reap(child, zygote))
    with theirs, channel, pytest.raises(MachineDisturbed, match="sandbox process: landlock: no such thing"):
        worker.load(Spec("cmc"))


# The proof


@linux
def test_the_seal_is_proven_at_first_and_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawner, "PROVE_EVERY", 5)
    proven: list[Proof] = []
    made = SandboxSpawner()
    check = made.check

    def counted() -> Proof:
        proven.append(check())
        return proven[-1]

    monkeypatch.setattr(made, "check", counted)
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


def kill_zygote(made: SandboxSpawner) -> None:
    assert made._zygote is not None
    made._zygote.kill()
    made._zygote.wait()


def wait_for_end(worker: SandboxHandle) -> None:
    assert select.select([worker._handle], [], [], 30)[0], "the process has not ended"


@linux
@pytest.mark.parametrize("later", [True, False])
async def test_children_of_a_zygote_that_dies_are_not_at_fault(later: bool) -> None:
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
def test_a_zygote_that_dies_is_replaced_and_the_new_one_outlives_the_old_ones_children() -> None:
    made = SandboxSpawner()
    old = made.spawn()
    kill_zygote(made)
    wait_for_end(old)
    new = made.spawn()
    first = made._zygote
    assert old.close() is None  # its status went with its zygote
    new.load(Spec("cmc"))
    made.spawn().close()
    assert made._zygote is first
    assert new.alive
    new.close()
    made.close()


@linux
def test_an_order_that_cannot_be_carried_out_does_not_end_the_zygote(nest: SandboxSpawner) -> None:
    worker = nest.spawn()
    assert nest._zygote is not None
    assert nest._reap(os.getpid(), nest._zygote.pid) is None  # no child of its own
    worker.load(Spec("cmc"))
    worker.close()


@linux
def test_a_child_killed_from_outside_while_it_is_idle_is_not_at_fault(nest: SandboxSpawner) -> None:
    sealed = controller(nest, STEPPING)
    os.kill(sealed.handle.process, signal.SIGKILL)
    wait_for_end(sealed.handle)
    assert not sealed.handle.alive
    with pytest.raises(MachineDisturbed, match="killed from outside while it was idle"):
        sealed.decide(State(LIMITS))
    with pytest.raises(MachineDisturbed, match="killed from outside while it was idle"):  # and remembered for it
        sealed.decide(State(LIMITS))


@linux
async def test_an_answer_that_can_be_read_is_not_late_however_busy_the_loop_was(nest: SandboxSpawner) -> None:
    sealed = controller(nest, STEPPING, hard_s=0.2)
    deciding = asyncio.create_task(sealed.decide_later(State(LIMITS)))
    await asyncio.sleep(0)  # it has been asked
    asked = time.monotonic()
    assert select.select([sealed.handle._channel], [], [], 30)[0]
    while time.monotonic() < asked + 0.3:  # this is what a stalled loop is
        pass
    assert len(await deciding) == 3
    sealed.close()


@linux
async def test_an_answer_too_large_to_be_written_at_once_waits_for_its_owner(nest: SandboxSpawner) -> None:
    """The child stands still until the owner reads: that is no time of its own."""
    wide = Limits(10, 1 << 14)
    source = HEAD + "        return [branch()] * 100_000"
    sealed = controller(nest, source, hard_s=0.2)
    deciding = asyncio.create_task(sealed.decide_later(State(wide)))
    await asyncio.sleep(0)
    asked = time.monotonic()
    assert select.select([sealed.handle._channel], [], [], 30)[0]
    while time.monotonic() < asked + 0.3:
        pass
    assert len(await deciding) == 100_000
    sealed.close()


@linux
async def test_a_child_that_was_given_no_processor_is_not_at_fault(nest: SandboxSpawner) -> None:
    """It shares one processor with a process that has three hundred times its weight.

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
            sealed = controller(nest, HEAD + "        while True: pass", hard_s=0.25)
            os.sched_setaffinity(sealed.handle.process, {here})
            os.sched_setscheduler(sealed.handle.process, os.SCHED_IDLE, os.sched_param(0))
            with pytest.raises((BoundaryViolation, MachineDisturbed)) as caught:
                await sealed.decide_later(State(LIMITS))
            ended.append(caught.value)
    finally:
        busy.kill()
        await busy.wait()
    assert "the machine is too busy" in str(ended[-1])


def test_who_is_to_blame_for_a_late_answer() -> None:
    def late(clock: Clock, seconds: float, **usage: float) -> type[Exception]:
        with ProcessUsageReader(os.getpid()) as meter:
            return type(explain_late(Deadline(meter, clock, seconds), ProcessUsage(**usage)))

    assert late(Clock.WALL, 0.25, wall=0.25, cpu=0.25) is BoundaryViolation
    assert (
        late(Clock.WALL, 0.25, wall=0.25, cpu=0.03, queued=0.22) is BoundaryViolation
    )  # an ordinary decision would be done
    assert late(Clock.WALL, 0.25, wall=0.25, cpu=0.0) is BoundaryViolation  # it slept
    assert late(Clock.WALL, 0.25, wall=0.25, cpu=0.01, queued=0.24) is MachineDisturbed
    assert late(Clock.CPU, 0.25, wall=9.0, cpu=0.25, queued=8.75) is BoundaryViolation
    assert late(Clock.CPU, 0.25, wall=9.0, cpu=0.1, queued=2.0) is BoundaryViolation
    assert late(Clock.CPU, 0.25, wall=120.0, cpu=0.1, queued=119.9) is MachineDisturbed


def test_a_python_that_does_not_start_is_a_seal_that_does_not_hold() -> None:
    for python in ("/nowhere/python", "/bin/true"):
        found = SandboxSpawner(python=python).check()
        assert not found.sealed
        assert "does not start" in str(found.lacking) or "failed" in str(found.lacking)


def test_what_an_end_proves() -> None:
    def ended(status: int) -> bool:
        return proof._judge(AttemptResult(status, "why"))[0]

    assert ended(31)  # SIGSYS
    assert ended(attempts.REFUSED << 8)
    for code in (attempts.ESCAPED, attempts.UNSURE, attempts.NOT_SEALED, 1):
        assert not ended(code << 8)
    assert not ended(9)
    assert not ended(11)


def test_every_layer_is_tried_alone_and_all_together() -> None:
    trials = [proof.Trial(one.what, one.layers, True, "") for one in attempts.ATTEMPTS]
    found = Proof(trials)
    assert found.sealed
    assert all(found.of(layer) for layer in Layer)
    together = {trial.what for trial in found.together}
    assert together >= {"read a file", "open a socket", "fork", "execute", "call as x32", "raise a limit"}
    assert Proof([]).lacking == "no attempt was made"
    assert [level.rank for level in SandboxLevel] == [2, 1, 0, 0]


@linux
def test_attempts_succeed_where_nothing_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would prove nothing. Not all can: this user may be nobody, and not every kernel knows x32."""
    made = SandboxSpawner()
    bare = [one._replace(layers=Layer(0)) for one in attempts.ATTEMPTS]
    monkeypatch.setattr(spawner, "ATTEMPTS", bare)
    could = {one.what for at, one in enumerate(bare) if made._attempt(at).status == attempts.ESCAPED}
    made.close()
    assert could >= {one.what for one in bare} - {"become root", "call as x32"}


@linux
@pytest.mark.parametrize("wait", ["posix.read(3, 1)", "lock.acquire()"])
def test_a_child_that_sleeps_is_late_by_either_clock(nest: SandboxSpawner, wait: str) -> None:
    """It uses no processor time, and nothing keeps it from a processor."""
    source = f"import posix, _thread\nlock = _thread.allocate_lock()\nlock.acquire()\n{HEAD}        {wait}"
    for clock in Clock:
        worker = nest.spawn(0.2, clock)
        worker.load(Spec("mine", source))
        with pytest.raises(BoundaryViolation) as crossed:
            SandboxedController(worker, 0.5).decide(State(LIMITS))
        assert crossed.value.boundary is Boundary.LATE
