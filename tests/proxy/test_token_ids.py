"""Contexts behave like lists of token ids, and their JSON is that of the whole list, however it has grown."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from proxy.token_ids import Context, GrowingIds, ids_json, prompts_json


def context(*parts: Sequence[int]) -> Context:
    return Context(*((ids, ids_json(ids)) for ids in parts))


@pytest.mark.parametrize("parts", [[], [[]], [[1]], [[1, 2], []], [[], [3]], [[1, 2], [3], [4, 5, 6]]])
def test_a_context_is_a_sequence_of_all_ids_of_its_parts(parts: list[list[int]]) -> None:
    joined, expected = context(*parts), [token for part in parts for token in part]
    assert (list(joined), len(joined), bool(joined)) == (expected, len(expected), bool(expected))
    assert joined == expected
    assert expected == joined
    assert joined != [*expected, 7]
    assert json.loads(joined.json) == expected
    bounds = [None, *range(-8, 9)]
    for start in bounds:
        for stop in bounds:
            assert joined[start:stop] == expected[start:stop]
            assert joined[start:stop:2] == expected[start:stop:2]
    for at in range(-len(expected), len(expected)):
        assert joined[at] == expected[at]
    for at in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            joined[at]


def test_a_context_does_not_grow_with_its_parts() -> None:
    branch = [1, 2]
    begun = context([9], branch)
    branch += [3]
    assert (list(begun), len(begun), begun[-2:], begun.json) == ([9, 1, 2], 3, [1, 2], b"[9,1,2]")
    longer = begun.followed_by([5, 6])
    assert (list(longer), longer.json, len(longer)) == ([9, 1, 2, 5, 6], b"[9,1,2,5,6]", 5)
    assert begun == [9, 1, 2]
    assert begun.followed_by([]).json == begun.json


def test_the_json_of_growing_ids_is_that_of_the_whole_list() -> None:
    rng, ids, growing = random.Random(1), list[int](), GrowingIds()
    assert growing.of(ids) == b""
    for _ in range(50):
        ids += [rng.randrange(2**31) for _ in range(rng.randrange(4))]
        assert json.loads(b"[%b]" % growing.of(ids)) == ids


def test_one_prompt_is_an_array_of_ids_and_several_are_an_array_of_arrays() -> None:
    assert prompts_json([[1, 2]]) == b"[1,2]"
    assert prompts_json([context([1], [2])]) == b"[1,2]"
    assert prompts_json([context([1], [2]), (3, 4)]) == b"[[1,2],[3,4]]"
