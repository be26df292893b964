"""Wire format between an owner and its sandbox process: frames of whole numbers, both ways.

    frame    = its length in bytes (4), then 64-bit numbers in the machine's order
                                                           process: READY, or a text: why it is not sealed
    owner    = LOAD, number, name, source                → process: number, text (empty, or a complaint)
             | STEP, number, {fact}, turn of several …   → process: number, decisions in the same order
             | CALL, number, name, {block}, {input}      → process: number, text (empty, or a complaint), {outcome}
    turn     = seat, BEGIN, β's bits, limits             the first of an episode: it has no rounds yet
             | seat, FACTS, {code}                       the round was carried out as decided
             | seat, AGAIN                               so it was, and its facts are those of the round before
             | seat, ROUND, {action}, {code}             the token limit shortened it
    decision = {action} | -1, complaint | -2             a complaint is an error message, as text; -2: as before
    {x}      = the number of items, then each item
    action   = one number: verb, branch, and intervals or label
    fact     = five numbers, the last its signals; its code is the number of facts sent before it. Those that recur are
               sent once. Before an inverted number of facts, the process forgets all that it knows
    block, input, outcome = text
    text     = {code point}

`number` counts the frames, so that a reply to another request is detected. An owner trusts no reply:
`decode_decision` builds well-formed actions or raises, and the owner's state checks whether they are legal.

This module can be compiled (`controllers/core/compiled.py`).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Final

from controllers.actions import ANSWER, BRANCH, PROBE, PRUNE, Action, Advanced, Fact, Probed, Verb
from controllers.errors import ControllersError
from controllers.limits import Limits
from controllers.signals import pack_signals, unpack_signals
from controllers.state import Round

MAX_FRAME_BYTES: Final = 1 << 20
"""Most bytes of a frame of a process."""
MAX_OWNER_BYTES: Final = 1 << 22
"""Most bytes of a frame of an owner. As many episodes as may share one may each have a round of new facts only."""
HEADER: Final = struct.Struct("=I")
LOAD, STEP, CALL = 1, 2, 3
READY: Final = -1
"""First frame of a process, alone: it is sealed, and no foreign code has run in it."""
BEGIN, FACTS, ROUND, AGAIN = 0, 1, 2, 3
COMPLAINT: Final = -1
UNCHANGED: Final = -2
"""In place of the number of actions: the episode's decision is the one before."""
MAX_COMPLAINT_CHARS: Final = 500
"""Most characters of a complaint that are passed on."""
NONE: Final = -1
"""Stands for a bound that is not set."""
MAX_CACHED_ACTIONS: Final = 1 << 16
"""Most actions that are cached, in each direction."""

MAX_KNOWN: Final = 1 << 17
"""Facts after which a process forgets all. They take about 90 bytes each of the memory that the controller has too."""
MAX_NUMBERED: Final = 1 << 12
"""Facts of smaller numbers are found by them."""

_ACT: Final = 3
"""Bits below an action's branch."""
_AT: Final = 24
"""Bits below an action's intervals or label."""
_MOST_BRANCH: Final = 1 << 21
_MOST_VALUE: Final = 1 << 38
_PROBED: Final = -1
"""In place of the intervals of a fact that has none."""
_RUNNING: Final = -2
"""In place of a label, of a branch that has not finished."""
_FACT: Final = 5
"""Numbers of a fact."""
NUMBERS_PER_NEW_FACT: Final = _FACT + 2
"""Numbers of a fact that is sent for the first time: itself, its code, and its action if the round was shortened."""

_actions: Final[dict[int, Action]] = {}
_numbers: Final[dict[int, int]] = {}
"""Numbers of actions, by an action's id."""
_kept: Final[list[Action]] = []
"""Keeps those actions alive, so that their ids are not reused."""


Decision = list[Action] | str | None
"""The actions of a decision, a complaint, or None: the actions are those of the episode's decision before."""


class BadFrame(Exception):
    """A frame that cannot be decoded. Only a sandbox process sends one."""


def pack(numbers: Sequence[int], most: int = MAX_FRAME_BYTES) -> bytes:
    """Return a frame of `numbers`. Raises BadFrame if it would be too large."""
    body = array("q", numbers).tobytes()
    if len(body) > most:
        raise BadFrame(f"a frame of {len(body)} bytes; at most {most} are allowed")
    return HEADER.pack(len(body)) + body


def body_size(header: bytes, most: int = MAX_FRAME_BYTES) -> int:
    """Return the bytes that follow a header. Raises BadFrame if they are too many or not a multiple of 8."""
    (length,) = HEADER.unpack(header)
    if length > most or length % 8:
        raise BadFrame(f"a frame that claims {length} bytes; at most {most} are allowed, a multiple of 8")
    return int(length)


def unpack(body: bytes | bytearray) -> list[int]:
    """Return the numbers of a frame's body, which is a multiple of 8 bytes."""
    numbers = array("q")
    numbers.frombytes(body)
    return numbers.tolist()


# Turns, from the owner


def encode_begin(seat: int, beta: float, limits: Limits) -> list[int]:
    """Encode the first turn of an episode."""
    bounds = (limits.interval, limits.max_branches, limits.branch_tokens, limits.probe_tokens, limits.max_tokens)
    (bits,) = struct.unpack("=q", struct.pack("=d", beta))
    flags = (int(limits.has_probes), int(limits.has_pauses))
    return [seat, BEGIN, bits, *(NONE if bound is None else bound for bound in bounds), *flags]


class FactCodes:
    """Codes of the facts sent to a process, by identity: most facts are interned and recur.

    Those that replay has numbered are found by their numbers, which takes half as long as by a dictionary. The end of a
    branch is a fact of its own, which does not recur. It is forgotten once it has been sent. So are all facts once the
    process knows MAX_KNOWN: with recorded costs of probes, every probe is a new fact.
    """

    def __init__(self) -> None:
        self._codes: dict[int, int] = {}  # by id, of facts without a number
        self._numbered: list[Fact | None] = []  # by number
        self._numbered_codes: list[int] = []
        self._kept: list[Fact] = []  # keeps facts alive, so that their ids are not reused
        self._sent = 0  # since the process last forgot all facts
        self._new: list[int] = []
        self._forgets = False  # with the next frame

    def codes_of(self, facts: Sequence[Fact]) -> list[int]:
        """Return the codes of `facts`. New facts are sent with the next frame."""
        numbered, numbered_codes, codes = self._numbered, self._numbered_codes, list[int]()
        for fact in facts:
            if fact.number is not None:
                number: int = fact.number
                if number < len(numbered) and numbered[number] is fact:
                    codes.append(numbered_codes[number])
                    continue
            codes.append(self._send(fact))
        return codes

    def _send(self, fact: Fact) -> int:
        """Return the code of a fact that may be new."""
        code = self._codes.get(id(fact), -1)
        if code >= 0:
            return code
        code = self._sent
        self._sent += 1
        self._encode(fact)
        number = fact.number
        if number is not None and number < MAX_NUMBERED:
            missing = number + 1 - len(self._numbered)
            if missing > 0:
                self._numbered += [None] * missing
                self._numbered_codes += [0] * missing
            if self._numbered[number] is None:  # recordings with other intervals have other facts of this number
                self._numbered[number], self._numbered_codes[number] = fact, code
                return code
        if not (isinstance(fact, Advanced) and fact.finished):
            self._codes[id(fact)] = code
            self._kept.append(fact)
        return code

    def new_facts(self) -> list[int]:
        """Return the facts that the process must get before the codes of this frame's turns, as {fact}."""
        new, self._new = self._new, []
        count = len(new) // _FACT
        numbers = [~count if self._forgets else count, *new]
        self._forgets = self._sent >= MAX_KNOWN
        if self._forgets:
            self._sent = 0
            for known in (self._codes, self._numbered, self._numbered_codes, self._kept):
                known.clear()
        return numbers

    def _encode(self, fact: Fact) -> None:
        label = NONE if fact.label is None else fact.label
        if type(fact) is Advanced:
            ending = label if fact.finished else _RUNNING
            signals = pack_signals(fact.confidence, fact.lowest)
            self._new += (fact.branch, fact.intervals, ending, fact.tokens, signals)
        else:
            self._new += (fact.branch, _PROBED, label, fact.tokens, pack_signals(fact.confidence, None))


def decode_facts(numbers: list[int], at: int, facts: list[Fact]) -> int:
    """Append the {fact} at `at` to `facts`; return the position after it."""
    count = numbers[at]
    if count < 0:
        facts.clear()
        count = ~count
    end = at + 1 + _FACT * count
    for first in range(at + 1, end, _FACT):
        branch, intervals, code = numbers[first], numbers[first + 1], numbers[first + 2]
        tokens, signals = numbers[first + 3], numbers[first + 4]
        label = None if code < 0 else code
        if not signals and intervals != _PROBED:  # the most frequent: facts that recur are sent once
            facts.append(Advanced(branch, intervals, tokens, code != _RUNNING, label))
            continue
        confidence, lowest = unpack_signals(signals)
        if intervals == _PROBED:
            facts.append(Probed(branch, label, tokens, confidence))
        else:
            facts.append(Advanced(branch, intervals, tokens, code != _RUNNING, label, confidence, lowest))
    return end


def encode_turn(
    seat: int, decided: Sequence[Action], last: Round, codes: FactCodes, before: Sequence[Fact] = ()
) -> list[int]:
    """Encode a later turn. `last` has the actions that were carried out, of those `decided`, and their facts.

    `before` has the facts of the round before it.
    """
    actions, facts = last.actions, last.facts
    if actions is decided or list(actions) == list(decided):
        if before and facts == before:
            return [seat, AGAIN]
        numbers = [seat, FACTS, len(facts)]
    else:
        numbers = [seat, ROUND, len(actions), *map(encode_action, actions), len(facts)]
    numbers += codes.codes_of(facts)
    return numbers


def decode_begin(numbers: Sequence[int], at: int) -> tuple[float, Limits, int]:
    """Return β and the limits of a first turn, and the position of the next turn."""
    (beta,) = struct.unpack("=d", struct.pack("=q", numbers[at]))
    interval, most, branch, probe, cap, has_probes, has_pauses = numbers[at + 1 : at + 8]
    bounds = (None if branch == NONE else branch, probe, None if cap == NONE else cap)
    return beta, Limits(interval, most, *bounds, has_probes=bool(has_probes), has_pauses=bool(has_pauses)), at + 8


def decode_turn(
    numbers: list[int], at: int, decided: Sequence[Action], known: list[Fact], before: Sequence[Fact] = ()
) -> tuple[Sequence[Action], Sequence[Fact], int]:
    """Return the actions and facts of the later turn at `at`, and the position of the next turn.

    `decided` and `before` are the actions decided last and the facts of the round before.
    """
    if numbers[at + 1] == AGAIN:
        return decided, before, at + 2
    if numbers[at + 1] == ROUND:
        end = at + 3 + numbers[at + 2]
        decided, at = [decode_action(number) for number in numbers[at + 3 : end]], end - 2
    end = at + 3 + numbers[at + 2]
    return decided, [known[code] for code in numbers[at + 3 : end]], end


# Decisions, from the process


def encode_action(action: Action) -> int:
    """Return an action as a number. Raises BadFrame if it is out of range, and any error if it is not an action."""
    label, branch = action.label, action.branch + 1
    value = action.intervals if label is None else label + 1
    if not (0 <= branch < _MOST_BRANCH and (label is not None) <= value < _MOST_VALUE):
        raise BadFrame(f"{action} names a branch or label that cannot exist")
    number = int(action.verb) + (branch << _ACT) + (value << _AT)
    if len(_kept) < MAX_CACHED_ACTIONS and id(action) not in _numbers:
        _numbers[id(action)] = number
        _kept.append(action)
    return number


def encode_actions(actions: Sequence[Action]) -> list[int]:
    """Return the number of actions and then each action as a number. Raises like `encode_action`."""
    numbers = [0]
    try:
        numbers.extend(map(_numbers.__getitem__, map(id, actions)))
    except KeyError:
        numbers = [0, *map(encode_action, actions)]
    numbers[0] = len(numbers) - 1
    return numbers


def decode_action(number: int) -> Action:
    """Return the action that a number encodes. Raises BadFrame if there is none."""
    try:
        return _actions[number]
    except KeyError:
        action = _decode(number)
        if len(_actions) < MAX_CACHED_ACTIONS:
            _actions[number] = action
        return action


def _decode(number: int) -> Action:
    try:
        verb = Verb(number & (1 << _ACT) - 1)
        branch, value = (number >> _ACT) % _MOST_BRANCH - 1, number >> _AT
        about_none, valued = verb in (BRANCH, ANSWER), verb not in (PROBE, PRUNE)
        if number < 0 or about_none != (branch == -1) or not (valued or value == 0):
            raise BadFrame(f"{number} does not encode an action")
        if verb is ANSWER:
            return Action(verb, label=None if value == 0 else value - 1)
        return Action(verb, branch, value)
    except (ValueError, ControllersError):
        raise BadFrame(f"{number} does not encode an action") from None


def decode_decision(numbers: list[int], at: int, most: int) -> tuple[Decision, int]:
    """Return the decision at `at` and the position of the next one. Raises BadFrame, also for over `most` actions."""
    try:
        count = numbers[at]
        if count == UNCHANGED:
            return None, at + 1
        if count == COMPLAINT:
            return decode_text(numbers, at + 1, MAX_COMPLAINT_CHARS)
    except IndexError:
        raise BadFrame("the frame is cut off") from None
    end = at + 1 + count
    if not 0 <= count <= most:
        raise BadFrame(f"{count} actions in a round; at most {most} can be legal")
    if end > len(numbers):
        raise BadFrame("the frame is cut off")
    return [decode_action(number) for number in numbers[at + 1 : end]], end


def decode_decisions(numbers: list[int], at: int, count: int, most: int) -> tuple[list[Decision], int]:
    """Return `count` decisions that begin at `at`, and the position after them. Raises like `decode_decision`."""
    known, total = _actions.__getitem__, len(numbers)
    decisions: list[Decision] = []
    for _ in range(count):
        end = at + 1 + numbers[at] if at < total else -1
        if at < end <= min(total, at + 1 + most):
            try:
                decisions.append(list(map(known, numbers[at + 1 : end])))
                at = end
                continue
            except KeyError:
                pass
        decision, at = decode_decision(numbers, at, most)
        decisions.append(decision)
    return decisions, at


def encode_complaint(error: str) -> list[int]:
    """Encode a complaint in place of a decision."""
    return [COMPLAINT, *encode_text(error[:MAX_COMPLAINT_CHARS])]


def encode_text(text: str) -> list[int]:
    """Return a text as numbers."""
    return [len(text), *map(ord, text)]


def decode_text(numbers: Sequence[int], at: int, most: int) -> tuple[str, int]:
    """Return the text at `at` and the position after it. Raises BadFrame if it is cut or longer than `most`."""
    length = numbers[at] if at < len(numbers) else -1
    end = at + 1 + length
    if not 0 <= length <= most or end > len(numbers):
        raise BadFrame(f"a text of {length} characters; at most {most} are allowed")
    return "".join(chr(point) if 0 <= point <= 0x10FFFF else "?" for point in numbers[at + 1 : end]), end


def encode_texts(texts: Sequence[str]) -> list[int]:
    """Return texts as numbers, with their count."""
    return [len(texts), *(number for text in texts for number in encode_text(text))]


def decode_texts(numbers: Sequence[int], at: int, most: int, longest: int) -> tuple[list[str], int]:
    """Return the texts at `at` and the position after them. Raises BadFrame if they are too many or too long."""
    count = numbers[at] if at < len(numbers) else -1
    if not 0 <= count <= most:
        raise BadFrame(f"{count} texts; at most {most} are allowed")
    texts, at = [], at + 1
    for _ in range(count):
        text, at = decode_text(numbers, at, longest)
        texts.append(text)
    return texts, at


def decode_complaint(reply: Sequence[int]) -> str:
    """Return the complaint about a file to load; empty if there is none. Raises BadFrame."""
    return decode_text(reply, 1, MAX_COMPLAINT_CHARS)[0]


def printable(text: str) -> str:
    """Return `text` with unprintable characters replaced, so that it cannot control a terminal or forge a log line."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def most_actions(limits: Limits) -> int:
    """Return a bound above any sensible round: each branch can be advanced, probed and pruned."""
    return 8 * max(64, limits.max_branches)
