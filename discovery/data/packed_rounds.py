"""Encode the rounds of one episode as text, for a column of the store.

The text is a sequence of 32-bit integers, compressed and in base64. Each round has its number of actions and of facts,
then three numbers for each action (verb, branch or label, intervals) and five for each fact (branch, label, tokens,
intervals, flags). It compresses well, because branches that run side by side repeat nearly the same numbers. The lowest
bit of the flags says whether the branch finished. The others are the signals as one number, 0 if they are unknown.
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
from controllers.signals import pack_signals, unpack_signals
from discovery.errors import TraceError

MAX_UNPACKED_BYTES: Final = 64 * 2**20
"""Limit on the size of a decompressed text."""
NONE: Final = -1
"""Stands for a missing label, and for the intervals of a probe's fact."""


def pack_rounds(rounds: Sequence[Round]) -> str:
    """Return `rounds` as text, empty if there are none."""
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
                flags = int(fact.finished)
                if fact.confidence is not None or fact.lowest is not None:
                    flags += 2 * pack_signals(fact.confidence, fact.lowest)
                flat += (fact.branch, number, fact.tokens, fact.intervals, flags)
            else:
                flags = 0 if fact.confidence is None else 2 * pack_signals(fact.confidence, None)
                flat += (fact.branch, number, fact.tokens, NONE, flags)
    numbers = array("i", flat)
    if sys.byteorder == "big":
        numbers.byteswap()
    return b64encode(zlib.compress(numbers.tobytes(), 1)).decode() if flat else ""


def unpack_rounds(text: str) -> list[Round]:
    """Return the rounds that `pack_rounds` encoded. Raises TraceError."""
    try:
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(b64decode(text, validate=True), MAX_UNPACKED_BYTES) if text else b""
        if text and not unpacker.eof:
            raise TraceError(f"the rounds of an episode are truncated, or larger than {MAX_UNPACKED_BYTES} bytes")
        numbers = iter(np.frombuffer(plain, "<i4").tolist())
        return list(_rounds(numbers))
    except (ValueError, zlib.error, ControllerError) as error:
        raise TraceError(f"the rounds of an episode cannot be read: {error}") from None


def _rounds(numbers: Iterator[int]) -> Iterator[Round]:
    for count in numbers:
        fact_count = next(numbers, 0)
        actions = [_action(*one) for one in _groups(numbers, count, 3)]
        yield Round(actions, [_fact(*one) for one in _groups(numbers, fact_count, 5)])


def _groups(numbers: Iterator[int], count: int, size: int) -> Iterator[list[int]]:
    for _ in range(count):
        group = list(islice(numbers, size))
        if len(group) != size:
            raise ValueError("it ends in the middle of a round")
        yield group


def _action(verb: int, branch: int, intervals: int) -> Action:
    if verb == Verb.ANSWER:
        return Action(Verb.ANSWER, label=None if branch == NONE else branch)
    return Action(Verb(verb), branch, intervals)


def _fact(branch: int, label: int, tokens: int, intervals: int, flags: int) -> Fact:
    number = None if label == NONE else label
    confidence, lowest = unpack_signals(flags >> 1)
    if intervals == NONE:
        return Probed(branch, number, tokens, confidence)
    return Advanced(branch, intervals, tokens, bool(flags & 1), number, confidence, lowest)
