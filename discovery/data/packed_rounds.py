"""The rounds of one episode as a text, for a row of the store.

Whole numbers one after the other: of each round how many actions and facts it has, then three numbers an action (verb,
branch or label, intervals) and five a fact (branch, label, tokens, intervals, finished). They are compressed, for
branches that run side by side say nearly the same round after round.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import numpy as np

from controllers import Action, Advanced, ControllerError, Fact, Probed, Round, Verb
from controllers.actions import ANSWER
from discovery.errors import TraceError

MAX_UNPACKED_BYTES: Final = 64 * 2**20
"""Bytes a text may unpack to."""
NONE: Final = -1
"""In place of a label where there is none, and of the intervals of a fact that tells of none: a probe's."""


def pack_rounds(rounds: Sequence[Round]) -> str:
    """`rounds` as a text; empty if there are none."""
    flat: list[int] = []
    for actions, facts in rounds:
        flat += (len(actions), len(facts))
        for action in actions:
            verb = action.verb
            if verb is ANSWER:
                flat += (verb, NONE if action.label is None else action.label, 0)
            else:
                flat += (verb, action.branch, action.intervals)
        for fact in facts:
            label = fact.label
            number = NONE if label is None else label
            if type(fact) is Advanced:
                flat += (fact.branch, number, fact.tokens, fact.intervals, fact.finished)
            else:
                flat += (fact.branch, number, fact.tokens, NONE, 0)
    numbers = array("i", flat)
    if sys.byteorder == "big":
        numbers.byteswap()
    return b64encode(zlib.compress(numbers.tobytes(), 1)).decode() if flat else ""


def unpack_rounds(text: str) -> list[Round]:
    """The rounds `packed` made a text of. Raises TraceError."""
    try:
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(b64decode(text, validate=True), MAX_UNPACKED_BYTES) if text else b""
        if text and not unpacker.eof:
            raise TraceError(f"the rounds of an episode are cut, or more than {MAX_UNPACKED_BYTES} bytes")
        numbers = iter(np.frombuffer(plain, "<i4").tolist())
        return list(_rounds(numbers))
    except (ValueError, zlib.error, ControllerError) as error:
        raise TraceError(f"the rounds of an episode cannot be read: {error}") from None


def _rounds(numbers: Iterator[int]) -> Iterator[Round]:
    for count in numbers:
        found = next(numbers, 0)
        actions = [_action(*one) for one in _groups(numbers, count, 3)]
        yield Round(actions, [_fact(*one) for one in _groups(numbers, found, 5)])


def _groups(numbers: Iterator[int], count: int, size: int) -> Iterator[list[int]]:
    for _ in range(count):
        group = list(islice(numbers, size))
        if len(group) != size:
            raise ValueError("it ends in the middle")
        yield group


def _action(verb: int, branch: int, intervals: int) -> Action:
    if verb == Verb.ANSWER:
        return Action(Verb.ANSWER, label=None if branch == NONE else branch)
    return Action(Verb(verb), branch, intervals)


def _fact(branch: int, label: int, tokens: int, intervals: int, finished: int) -> Fact:
    number = None if label == NONE else label
    return (
        Probed(branch, number, tokens)
        if intervals == NONE
        else Advanced(branch, intervals, tokens, bool(finished), number)
    )
