"""The sandbox process: it keeps a copy of each episode's state, calls the controller and replies to its owner.

This code protects nothing: the controller shares the process and can change everything in it. It can corrupt only its
own copies and replies.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from controllers.actions import Action, Fact
from controllers.episode import Controller, complaint
from controllers.loading import Spec, make
from controllers.sandbox.frames import (
    BEGIN,
    CALL,
    HEADER,
    LOAD,
    MAX_COMPLAINT_CHARS,
    MAX_OWNER_BYTES,
    READY,
    UNCHANGED,
    body_size,
    decode_begin,
    decode_facts,
    decode_text,
    decode_texts,
    decode_turn,
    encode_actions,
    encode_complaint,
    encode_text,
    encode_texts,
    pack,
    unpack,
)
from controllers.sandbox.functions import call_function
from controllers.state import State

CHANNEL = 3
"""Descriptor of the channel to the owner. The process has no other besides 0 to 2."""
READ_BYTES = 1 << 16
"""Most bytes of a frame that are read at once."""


class _RunningEpisode:
    """A controller and its copy of the episode's state."""

    def __init__(self, controller: Controller, state: State) -> None:
        self.controller = controller
        self.state = state
        self.decided: Sequence[Action] = ()  # a copy, because the controller may change its list
        self.facts: Sequence[Fact] = ()  # of the latest round


def serve() -> None:
    """Answer frames until the owner closes the channel."""
    episodes: dict[int, _RunningEpisode] = {}
    facts: list[Fact] = []
    spec: Spec | None = None
    _write([READY])
    while numbers := _read():
        kind, number = numbers[0], numbers[1]
        if kind == LOAD:
            spec, problem = _load(numbers)
            _write([number, *encode_text(problem)])
        elif kind == CALL:
            _write([number, *_call(numbers)])
        elif spec is not None:
            reply = [number]
            at = decode_facts(numbers, 2, facts)
            while at < len(numbers):
                at = _turn(numbers, at, spec, episodes, facts, reply)
            _write(reply)


def only_built_in_imports() -> None:
    """Let later imports of other modules raise ImportError. Otherwise opening their files would kill the process."""
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ == "_frozen_importlib"]


def _load(numbers: Sequence[int]) -> tuple[Spec | None, str]:
    """Load the controller of a LOAD frame. Return it and an empty text, or None and what is wrong with it."""
    name, at = decode_text(numbers, 2, len(numbers))
    source, _ = decode_text(numbers, at, len(numbers))
    spec = Spec(name, source or None)
    try:
        _ = spec.factory
        return spec, ""
    except BaseException as error:  # foreign code
        return None, str(error) or type(error).__name__


def _call(numbers: Sequence[int]) -> list[int]:
    """Call the function of a CALL frame. Return what is wrong with it, and its outcomes."""
    most = len(numbers)
    name, at = decode_text(numbers, 2, most)
    blocks, at = decode_texts(numbers, at, most, most)
    inputs, _ = decode_texts(numbers, at, most, most)
    warnings.simplefilter("ignore")  # to show a warning, Python would open files
    try:
        return [*encode_text(""), *encode_texts(call_function(blocks, name, inputs))]
    except BaseException as error:  # foreign code
        problem = ascii(str(error))[1:-1] or type(error).__name__
        return [*encode_text(problem[:MAX_COMPLAINT_CHARS]), *encode_texts([])]


def _turn(
    numbers: list[int],
    at: int,
    spec: Spec,
    episodes: dict[int, _RunningEpisode],
    facts: list[Fact],
    reply: list[int],
) -> int:
    """Play the turn at `at` and append the decision to `reply`. Return the position of the next turn."""
    if numbers[at + 1] == BEGIN:
        number = numbers[at]
        beta, limits, at = decode_begin(numbers, at + 2)
        try:
            episode = episodes[number] = _RunningEpisode(make(spec, beta), State(limits))
        except BaseException as error:  # foreign code
            reply += encode_complaint(str(error))
            return at
    else:
        episode = episodes[numbers[at]]
        actions, episode.facts, at = decode_turn(numbers, at, episode.decided, facts, episode.facts)
        episode.state.apply(list(actions), list(episode.facts))  # copies, because the controller may change them
    try:
        decided = episode.controller.decide(episode.state)
    except BaseException as error:  # foreign code
        reply += encode_complaint(complaint(episode.controller, error))
        return at
    try:
        if not isinstance(decided, (list, tuple)):
            raise TypeError("it is no list")
        if decided == episode.decided:
            reply.append(UNCHANGED)
        else:
            reply += encode_actions(decided)
            episode.decided = list(decided)
    except BaseException as error:  # foreign objects
        reply += encode_complaint(_no_actions(episode.controller, decided, error))
    return at


def _no_actions(controller: object, decided: object, error: BaseException) -> str:
    """Return what is wrong with a decision that could not be encoded, and what to return instead."""
    name = type(controller).__name__
    if isinstance(decided, (list, tuple)):
        for place, entry in enumerate(decided):
            if not isinstance(entry, Action):
                return (
                    f"{name} did not return a list of actions: entry {place} is {_in_words(entry)}; "
                    "make each with branch(), advance(), probe(), prune() or answer()"
                )
        return f"{name} did not return a list of actions: {error}"
    return f"{name} did not return a list of actions but {_in_words(decided)}; return [branch()], for example"


def _in_words(value: object) -> str:
    """Return a value that a controller returned; only its type unless it is plain, as `repr` may be foreign code."""
    plain = value is None or type(value) in (bool, int, float, str)
    return repr(value)[:80] if plain else f"a value of type {type(value).__name__}"


def _read() -> list[int]:
    """Return the next frame; an empty list when the owner has closed the channel.

    The owner sends a frame only after the reply to the one before, so what can be read belongs to one frame.
    """
    data = os.read(CHANNEL, READ_BYTES)
    missing = HEADER.size - len(data)
    while missing > 0 or (missing := HEADER.size + _body_size(data) - len(data)):
        more = os.read(CHANNEL, missing)
        if not more:
            return []
        data += more
        missing = HEADER.size - len(data)
    return unpack(data[HEADER.size :])


def _body_size(data: bytes) -> int:
    return body_size(data[: HEADER.size], MAX_OWNER_BYTES)


def _write(numbers: Sequence[int]) -> None:
    data = memoryview(pack(numbers))
    while data:
        data = data[os.write(CHANNEL, data) :]
