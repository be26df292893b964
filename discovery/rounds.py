"""The rounds of one episode as a text, for a row of the store.

Each round is a list of its actions and its facts, all in whole numbers; the text is compressed, for branches that run
side by side say nearly the same round after round.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Final

from controllers import Action, Advanced, ControllerError, Fact, Probed, Round, Verb
from discovery.errors import TraceError

LARGEST: Final = 64 * 2**20
"""Bytes a text may unpack to."""


def packed(rounds: Sequence[Round]) -> str:
    """`rounds` as a text; empty if there are none."""
    if not rounds:
        return ""
    plain = [[[_action(one) for one in played.actions], [_fact(one) for one in played.facts]] for played in rounds]
    return b64encode(zlib.compress(json.dumps(plain, separators=(",", ":")).encode())).decode()


def unpacked(text: str) -> list[Round]:
    """The rounds `packed` made a text of. Raises TraceError."""
    if not text:
        return []
    try:
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(b64decode(text, validate=True), LARGEST)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise TraceError(f"the rounds of an episode are cut, or more than {LARGEST} bytes")
        return [
            Round([_acted(*one) for one in actions], [_told(*one) for one in facts])
            for actions, facts in json.loads(plain)
        ]
    except (ValueError, TypeError, zlib.error, ControllerError) as error:
        raise TraceError(f"the rounds of an episode cannot be read: {error}") from None


def _action(action: Action) -> list[int | None]:
    """Verb, branch, intervals; an answer's label in their place."""
    if action.verb is Verb.ANSWER:
        return [int(action.verb), action.label]
    return [int(action.verb), action.branch, action.intervals]


def _acted(verb: int, branch: int | None, intervals: int = 0) -> Action:
    if verb == Verb.ANSWER:
        return Action(Verb.ANSWER, label=branch)
    return Action(Verb(verb), -1 if branch is None else branch, intervals)


def _fact(fact: Fact) -> list[int | None]:
    """Branch, label, tokens; of one that advanced also intervals, and whether it finished."""
    if isinstance(fact, Probed):
        return [fact.branch, fact.label, fact.tokens]
    return [fact.branch, fact.label, fact.tokens, fact.intervals, int(fact.finished)]


def _told(branch: int, label: int | None, tokens: int, intervals: int = -1, finished: int = 0) -> Fact:
    if intervals < 0:
        return Probed(branch, label, tokens)
    return Advanced(branch, intervals, tokens, bool(finished), label)
