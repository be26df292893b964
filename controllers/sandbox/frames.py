"""What a controller's owner and its sealed child say to each other: frames of whole numbers, both ways.

    frame    = its length in bytes (4), then 64-bit numbers in the machine's order
                                                           child: READY, or a text that says why it is not sealed
    owner    = LOAD, number, name, source                → child: number, text (empty, or a complaint)
             | STEP, number, {fact}, turn of several …   → child: number, decision of each, in the same order
    turn     = seat, BEGIN, β's bits, limits             the first of an episode: it has no rounds yet
             | seat, FACTS, {code}                       the round was carried out as it was asked for
             | seat, ROUND, {action}, {code}             the cap cut it short
    decision = {action} | -1, complaint
    {x}      = how many, then each
    action   = one number: verb, branch, and intervals or label
    fact     = four numbers; it is told once, and its code from then on is how many were told before it
    text     = how many, {code point}

`number` counts the frames, so an answer to another question is known as such. An owner believes none of it: `decision`
builds well-formed actions or raises, and whether they are legal only the owner's state says.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Final

from controllers.actions import ANSWER, BRANCH, PROBE, PRUNE, Action, Advanced, Fact, Probed, Verb
from controllers.errors import ControllersError
from controllers.state import Limits, Round

LARGEST: Final = 1 << 20
"""Bytes a frame may have."""
HEADER: Final = struct.Struct("=I")
LOAD, STEP = 1, 2
READY: Final = -1
"""The first frame of a child, alone: it is sealed, and nothing foreign has run in it."""
BEGIN, FACTS, ROUND = 0, 1, 2
COMPLAINT: Final = -1
LONGEST: Final = 500
"""Characters of a complaint that are passed on."""
NONE: Final = -1
"""A bound that is not set."""
REMEMBERED: Final = 1 << 16
"""Actions that are kept ready, each way."""

_ACT, _AT = 3, 24  # bits below an action's branch, and below its intervals or label
_MOST_BRANCH, _MOST_VALUE = 1 << (_AT - _ACT), 1 << 38
_PROBED = -1  # in place of the intervals of a fact that has none
_RUNNING = -2  # in place of a label, of a branch that has not finished
_FACT = 4  # numbers of a fact

_actions: dict[int, Action] = {}
_numbers: dict[int, int] = {}  # by an action's id
_kept: list[Action] = []  # those actions, so that their ids are nobody else's


class BadFrame(Exception):
    """Numbers that mean nothing; only ever a child's fault."""


def pack(numbers: Sequence[int]) -> bytes:
    """A whole frame. Raises BadFrame if it would be too large."""
    body = array("q", numbers).tobytes()
    if len(body) > LARGEST:
        raise BadFrame(f"a frame of {len(body)} bytes; {LARGEST} are the most")
    return HEADER.pack(len(body)) + body


def size(header: bytes) -> int:
    """How many bytes follow a header. Raises BadFrame if that is too many or no whole number of numbers."""
    (length,) = HEADER.unpack(header)
    if length > LARGEST or length % 8:
        raise BadFrame(f"a frame that claims {length} bytes; {LARGEST} are the most, in eights")
    return int(length)


def unpack(body: bytes | bytearray) -> list[int]:
    """The numbers of a frame's body, a multiple of eight bytes."""
    numbers = array("q")
    numbers.frombytes(body)
    return numbers.tolist()


# Turns, from the owner


def begin(seat: int, beta: float, limits: Limits) -> list[int]:
    """The first turn of an episode."""
    bounds = (limits.interval, limits.max_branches, limits.branch_tokens, limits.probe_tokens, limits.max_tokens)
    (bits,) = struct.unpack("=q", struct.pack("=d", beta))
    return [seat, BEGIN, bits, *(NONE if bound is None else bound for bound in bounds)]


class FactCodes:
    """The facts an owner has told a child, by their identity: most are interned, and come again and again."""

    def __init__(self) -> None:
        self._codes: dict[int, int] = {}
        self._told: list[Fact] = []  # which keeps their ids from being given to others
        self._news: list[int] = []

    def of(self, facts: Sequence[Fact]) -> list[int]:
        """The codes of some facts; those that are new are told with the next frame."""
        codes = list(map(self._codes.get, map(id, facts)))
        if None in codes:
            codes = [self._tell(facts[at]) if code is None else code for at, code in enumerate(codes)]
        return codes  # type: ignore[return-value]

    def news(self) -> list[int]:
        """What the child has to be told before it is told of codes: {fact}."""
        news, self._news = self._news, []
        return [len(news) // _FACT, *news]

    def _tell(self, fact: Fact) -> int:
        known = self._codes.get(id(fact))
        if known is not None:  # it came twice among those that were new
            return known
        code = self._codes[id(fact)] = len(self._told)
        self._told.append(fact)
        label = NONE if fact.label is None else fact.label
        if type(fact) is Advanced:
            self._news += (fact.branch, fact.intervals, label if fact.finished else _RUNNING, fact.tokens)
        else:
            self._news += (fact.branch, _PROBED, label, fact.tokens)
        return code


def learn(numbers: Sequence[int], at: int, facts: list[Fact]) -> int:
    """Add the {fact} at `at` to `facts`, and give where what follows is."""
    end = at + 1 + _FACT * numbers[at]
    for first in range(at + 1, end, _FACT):
        branch, intervals, said, tokens = numbers[first : first + _FACT]
        label = None if said < 0 else said
        if intervals == _PROBED:
            facts.append(Probed(branch, label, tokens))
        else:
            facts.append(Advanced(branch, intervals, tokens, said != _RUNNING, label))
    return end


def follow(seat: int, asked: Sequence[Action], last: Round, codes: FactCodes) -> list[int]:
    """A later turn: `last` is what was carried out of what was `asked` for, and what came of it."""
    actions, facts = last
    if actions is asked or list(actions) == list(asked):
        return [seat, FACTS, len(facts), *codes.of(facts)]
    return [seat, ROUND, len(actions), *map(encode, actions), len(facts), *codes.of(facts)]


def begun(numbers: Sequence[int], at: int) -> tuple[float, Limits, int]:
    """β and the limits that stand behind seat and kind, and where the next turn is."""
    (beta,) = struct.unpack("=d", struct.pack("=q", numbers[at]))
    interval, most, branch, probe, cap = numbers[at + 1 : at + 6]
    limits = Limits(interval, most, None if branch == NONE else branch, probe, None if cap == NONE else cap)
    return beta, limits, at + 6


def followed(
    numbers: Sequence[int], at: int, asked: Sequence[Action], known: Sequence[Fact]
) -> tuple[Sequence[Action], list[Fact], int]:
    """The actions and facts of the later turn whose seat stands at `at`, and where the next turn is."""
    kind, at = numbers[at + 1], at + 2
    if kind == ROUND:
        end = at + 1 + numbers[at]
        asked, at = [decode(number) for number in numbers[at + 1 : end]], end
    end = at + 1 + numbers[at]
    return asked, list(map(known.__getitem__, numbers[at + 1 : end])), end


# Decisions, from the child


def encode(action: Action) -> int:
    """An action as a number. Raises BadFrame if it cannot be one, and whatever a thing that is no action raises."""
    label, branch = action.label, action.branch + 1
    value = action.intervals if label is None else label + 1
    if not (0 <= branch < _MOST_BRANCH and (label is not None) <= value < _MOST_VALUE):
        raise BadFrame(f"{action} is about no branch or label there could be")
    number = int(action.verb) + (branch << _ACT) + (value << _AT)
    if len(_kept) < REMEMBERED and id(action) not in _numbers:
        _numbers[id(action)] = number
        _kept.append(action)
    return number


def encode_all(actions: Sequence[Action]) -> list[int]:
    """Actions as numbers, and first how many. Raises as `encode` does."""
    numbers = list(map(_numbers.get, map(id, actions)))
    if None in numbers:
        numbers = [encode(action) for action in actions]
    return [len(numbers), *numbers]  # type: ignore[list-item]


def decode(number: int) -> Action:
    """The action a number means. Raises BadFrame if it is none."""
    try:
        return _actions[number]
    except KeyError:
        action = _decode(number)
        if len(_actions) < REMEMBERED:
            _actions[number] = action
        return action


def _decode(number: int) -> Action:
    try:
        verb = Verb(number & (1 << _ACT) - 1)
        branch, value = (number >> _ACT) % _MOST_BRANCH - 1, number >> _AT
        about_none, valued = verb in (BRANCH, ANSWER), verb not in (PROBE, PRUNE)
        if number < 0 or about_none != (branch == -1) or not (valued or value == 0):
            raise BadFrame(f"{number} is no action")
        if verb is ANSWER:
            return Action(verb, label=None if value == 0 else value - 1)
        return Action(verb, branch, value)
    except (ValueError, ControllersError):
        raise BadFrame(f"{number} is no action") from None


def decision(numbers: Sequence[int], at: int, most: int) -> tuple[list[Action] | str, int]:
    """The decision at `at`, of at most so many actions, or what the child complains of; and where the next one is.

    Raises BadFrame.
    """
    try:
        count = numbers[at]
        if count == COMPLAINT:
            return text(numbers, at + 1, LONGEST)
    except IndexError:
        raise BadFrame("a frame that ends in the middle") from None
    end = at + 1 + count
    if not 0 <= count <= most:
        raise BadFrame(f"{count} actions in a round; {most} are the most that could be legal")
    if end > len(numbers):
        raise BadFrame("a frame that ends in the middle")
    actions = list(map(_actions.get, numbers[at + 1 : end]))
    if None in actions:
        actions = [decode(number) for number in numbers[at + 1 : end]]
    return actions, end  # type: ignore[return-value]


def complain(error: str) -> list[int]:
    """A decision that is none."""
    return [COMPLAINT, *told(error[:LONGEST])]


def told(words: str) -> list[int]:
    """A text as numbers."""
    return [len(words), *map(ord, words)]


def text(numbers: Sequence[int], at: int, most: int) -> tuple[str, int]:
    """The text at `at`, and where what follows is. Raises BadFrame if it is cut or has more than `most` characters."""
    length = numbers[at] if at < len(numbers) else -1
    end = at + 1 + length
    if not 0 <= length <= most or end > len(numbers):
        raise BadFrame(f"a text of {length} characters; {most} are the most")
    return "".join(chr(point) if 0 <= point <= 0x10FFFF else "?" for point in numbers[at + 1 : end]), end


def printable(words: str) -> str:
    """`words` with everything that is no letter, sign or space replaced: nothing for a terminal or a log to obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)


def most_actions(limits: Limits) -> int:
    """More actions than any sensible round has: every branch that is or may be open can move, be asked and pruned."""
    return 8 * max(64, limits.max_branches)
