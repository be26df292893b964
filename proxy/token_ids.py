"""Token ids whose JSON is kept, so that a branch that is sent again in each round is not encoded again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import overload

import msgspec


def ids_json(ids: Sequence[int]) -> bytes:
    """Return token ids as JSON without the brackets around them."""
    return msgspec.json.encode(ids if isinstance(ids, list) else list(ids))[1:-1]


class GrowingIds:
    """JSON of a list of token ids that grows at its end. Each id is encoded once."""

    __slots__ = ("_count", "_json")

    def __init__(self) -> None:
        self._json = b""
        self._count = 0

    def of(self, ids: list[int]) -> bytes:
        """Return the JSON of `ids`, without brackets. They begin with those of the call before."""
        if len(ids) > self._count:
            added = ids_json(ids[self._count :])
            self._json = b"%b,%b" % (self._json, added) if self._json else added
            self._count = len(ids)
        return self._json


class Context(Sequence[int]):
    """Token ids that a call continues: parts in a row, which are not copied, and their JSON.

    A part may grow at its end afterwards, but no id of it may change.
    """

    __slots__ = ("_jsons", "_length", "_parts")

    def __init__(self, *parts: tuple[Sequence[int], bytes]) -> None:
        """Each of `parts` has its JSON beside it, without brackets."""
        self._parts = [(ids, len(ids)) for ids, _ in parts if ids]
        self._jsons = [json for _, json in parts if json]
        self._length = sum(length for _, length in self._parts)

    @property
    def json(self) -> bytes:
        """The ids as a JSON array."""
        return b"[%b]" % b",".join(self._jsons)

    def followed_by(self, ids: Sequence[int]) -> Context:
        """Return these ids followed by a few others."""
        longer = Context((ids, ids_json(ids)))
        longer._parts[:0], longer._jsons[:0] = self._parts, self._jsons
        longer._length += self._length
        return longer

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(islice(ids, length) for ids, length in self._parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have no hash

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        if isinstance(at, int):
            index = range(self._length)[at]
            return self[index : index + 1][0]
        start, stop, step = at.indices(self._length)
        if step != 1:
            return list(self)[start:stop:step]
        taken: list[int] = []
        for ids, length in self._parts:
            if start < length and stop > 0:
                taken += ids[max(0, start) : min(stop, length)]
            start, stop = start - length, stop - length
        return taken


def prompts_json(prompts: Sequence[Sequence[int]]) -> bytes:
    """Return one prompt as a JSON array, or several as an array of arrays."""
    arrays = [prompt.json if isinstance(prompt, Context) else b"[%b]" % ids_json(prompt) for prompt in prompts]
    return arrays[0] if len(arrays) == 1 else b"[%b]" % b",".join(arrays)
