"""The sealed child: it keeps a copy of every episode's state, lets the controller decide on it, and answers its owner.

Nothing here is a safeguard: the controller shares this process and may change all of it. It may spoil its own copies
and its own answers, and no more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from controllers.actions import Action, Fact
from controllers.episode import Controller, complaint
from controllers.loading import Spec, make
from controllers.sandbox.frames import (
    BEGIN,
    HEADER,
    LOAD,
    READY,
    begun,
    complain,
    encode_all,
    followed,
    learn,
    pack,
    size,
    text,
    told,
    unpack,
)
from controllers.state import State

CHANNEL = 3
"""The descriptor a child talks to its owner by; besides 0 to 2 it has no other."""


class _Seat:
    """One episode under way."""

    def __init__(self, controller: Controller, state: State) -> None:
        self.controller = controller
        self.state = state
        self.asked: Sequence[Action] = ()


def serve() -> None:
    """Answer frames until the owner leaves."""
    seats: dict[int, _Seat] = {}
    facts: list[Fact] = []
    spec: Spec | None = None
    _write([READY])
    while numbers := _read():
        kind, number = numbers[0], numbers[1]
        if kind == LOAD:
            spec, words = _load(numbers)
            _write([number, *told(words)])
        elif spec is not None:
            reply = [number]
            at = learn(numbers, 2, facts)
            while at < len(numbers):
                at = _turn(numbers, at, spec, seats, facts, reply)
            _write(reply)


def only_built_in_imports() -> None:
    """What is not loaded by now cannot be: an import says so, rather than die at a file it may not open."""
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ == "_frozen_importlib"]


def _load(numbers: Sequence[int]) -> tuple[Spec | None, str]:
    """The controller a LOAD frame names, its source run; or what is wrong with it."""
    name, at = text(numbers, 2, len(numbers))
    source, _ = text(numbers, at, len(numbers))
    spec = Spec(name, source or None)
    try:
        _ = spec.factory
        return spec, ""
    except BaseException as error:  # foreign code
        return None, str(error) or type(error).__name__


def _turn(
    numbers: Sequence[int], at: int, spec: Spec, seats: dict[int, _Seat], facts: Sequence[Fact], reply: list[int]
) -> int:
    """Play the turn at `at`, add the decision to `reply`, and say where the next one is."""
    if numbers[at + 1] == BEGIN:
        number = numbers[at]
        beta, limits, at = begun(numbers, at + 2)
        try:
            seat = seats[number] = _Seat(make(spec, beta), State(limits))
        except BaseException as error:  # foreign code
            reply += complain(str(error))
            return at
    else:
        seat = seats[numbers[at]]
        actions, brought, at = followed(numbers, at, seat.asked, facts)
        seat.state.apply(actions, brought)
    try:
        seat.asked = seat.controller.decide(seat.state)
    except BaseException as error:  # foreign code
        reply += complain(complaint(seat.controller, error))
        return at
    try:
        reply += encode_all(seat.asked)
    except BaseException as error:  # foreign objects
        reply += complain(f"{type(seat.controller).__name__} decided on what is no list of actions: {error}")
    return at


def _read() -> list[int]:
    """The next frame; nothing when the owner has left."""
    header = _exactly(HEADER.size)
    return unpack(_exactly(size(header))) if header else []


def _exactly(count: int) -> bytes:
    """So many bytes, or none at the end."""
    data = os.read(CHANNEL, count)
    while 0 < len(data) < count:
        more = os.read(CHANNEL, count - len(data))
        if not more:
            return b""
        data += more
    return data


def _write(numbers: Sequence[int]) -> None:
    data = memoryview(pack(numbers))
    while data:
        data = data[os.write(CHANNEL, data) :]
