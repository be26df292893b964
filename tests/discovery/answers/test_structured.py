"""Votes on tool calls and JSON: which values are equal, who wins, and that all of it takes bounded time."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.answers.structured import (
    CallSet,
    FieldBallot,
    InvalidJson,
    ToolBallot,
    ToolSchemas,
    canonical_text,
    fields_of,
    parse_json,
    select_by_calls,
    vote_on_fields,
    with_defaults,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"], "default": "C"},
        "days": {"$ref": "#/$defs/days"},
        "place": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}], "default": None},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/place"}},
    },
    "$defs": {
        "days": {"type": "integer", "default": 1},
        "place": {"type": "object", "properties": {"zoom": {"type": "number", "default": 1.5}}},
    },
}


def canonical(text: str, schema: object = None) -> str:
    return canonical_text(with_defaults(parse_json(text), schema))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b":[1.0,20e-1],"a":10E-1}'),
        ("0", "-0.0"),
        ("1e400", "10e399"),
        ("100", "1E2"),
        ("0.1", "1e-1"),
        ('"\\u00e9"', '"é"'),
        ("12345678901234567890", "1234567890123456789.0e1"),
    ],
)
def test_values_written_differently_are_equal(left: str, right: str) -> None:
    assert canonical(left) == canonical(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1", '"1"'),
        ("true", "1"),
        ("[1,2]", "[2,1]"),
        ("null", "{}"),
        ("12345678901234567890", "12345678901234567891"),
        ("0.1", "0.10000000000000000001"),
        ("-1", "1"),
        ('{"a": {"b": 1}}', '{"a": {}, "b": 1}'),
        ("[[],1]", "[[1]]"),
    ],
)
def test_different_values_differ(left: str, right: str) -> None:
    assert canonical(left) != canonical(right)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES, JSON_VALUES)
def test_canonical_texts_are_equal_exactly_if_the_values_are(left: Any, right: Any) -> None:
    assert canonical(json.dumps(left, indent=2)) == canonical(json.dumps(left, ensure_ascii=False, sort_keys=True))
    assert (canonical(json.dumps(left)) == canonical(json.dumps(right))) == _equal(left, right)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return Fraction(repr(left)) == Fraction(repr(right))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


def test_defaults_of_the_schema_are_filled_in() -> None:
    written = canonical('{"city":"Rome","unit":"C","days":1,"place":null}', SCHEMA)
    assert canonical('{"city":"Rome"}', SCHEMA) == written
    assert canonical('{"city":"Rome","unit":"F"}', SCHEMA) != written
    assert canonical('{"place":{}}', SCHEMA) == canonical('{"place":{"zoom":1.50}}', SCHEMA)
    assert canonical('{"stops":[{},{"zoom":2}]}', SCHEMA) == canonical(
        '{"stops":[{"zoom":15e-1},{"zoom":2.0}]}', SCHEMA
    )


@pytest.mark.parametrize(
    "schema",
    [True, False, 5, [], {"$ref": "#"}, {"$ref": "#/$defs/x"}, {"properties": []}, {"allOf": 3}, {"items": []}],
)
def test_a_schema_of_any_shape_changes_nothing_it_cannot(schema: object) -> None:
    assert with_defaults({"a": [1]}, schema) == {"a": [1]}


def test_a_schema_that_refers_to_itself_ends() -> None:
    loop = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    assert with_defaults({"x": 1}, loop) == {"x": 1}
    tree: dict[str, Any] = {"properties": {"next": {"$ref": "#"}, "on": {"default": True}}}
    assert with_defaults({"next": {"next": {}}}, tree) == {"next": {"next": {"on": True}, "on": True}, "on": True}
    twice = {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}
    assert with_defaults({"x": 1}, twice) == {"x": 1}


KEYS: Final = {f"k{i}": i for i in range(20_000)}


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ([[]] * 5_000, {"items": {"$ref": "#/items", **KEYS}}),
        ([[]] * 5_000, {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/b", **KEYS}, "b": KEYS}}),
        ([[]] * 5_000, {"items": {"anyOf": [{"type": "object"}] * 20_000}}),
    ],
    ids=["reference to itself", "references", "alternatives"],
)
def test_a_large_schema_is_not_read_again_for_each_value(value: Any, schema: Any) -> None:
    started = time.process_time()
    assert with_defaults(value, schema) == value
    assert time.process_time() - started < 2  # milliseconds; minutes if each value reads the schema


def test_many_calls_share_the_time_for_their_defaults() -> None:
    schema = {"properties": {**{key: {} for key in KEYS}, "on": {"default": True}}}
    started = time.process_time()
    assert ToolSchemas({"f": schema}).read([("f", "{}")] * 1000) is not None
    assert time.process_time() - started < 4  # half a second; twenty times that if each has all the time
    few = {"properties": {"on": {"default": True}}}
    read = ToolSchemas({"f": few}).read
    assert read([("f", "{}")] * 1000) == read([("f", '{"on": true}')] * 1000)


@pytest.mark.parametrize(
    "text",
    ['{"a":1,"a":2}', "[" * 300 + "]" * 300, "NaN", "{", "", "1 2", "9" * 5000, '"\ud800"', '"\\ud800"', '{"a":1}x'],
    ids=str.__len__,
)
def test_what_parsers_read_differently_is_no_json(text: str) -> None:
    with pytest.raises(InvalidJson):
        parse_json(text)


def test_large_and_deep_arguments_are_read() -> None:
    deep = "[" * 190 + "]" * 190
    calls = ToolSchemas({}).read([("f", json.dumps({"text": "x" * 1_000_000, "deep": json.loads(deep)}))])
    assert calls is not None
    assert len(calls.fields) == 2
    many = ToolSchemas({}).read([("f", json.dumps({f"k{i}": i for i in range(20_000)}))])
    assert many is not None
    assert len(many.fields) == 1  # too many to be compared one by one


def test_fields_are_named_by_json_pointers() -> None:
    value = {"a": {"b": 1, "c/d": [1, 2]}, "e~": {}, "": None}
    assert set(fields_of(value)) == {"/a/b", "/a/c~1d", "/e~0", "/"}
    assert fields_of([1]) == {"": "[1e0,]"}


# Votes on fields


def documents(*values: Any) -> list[FieldBallot]:
    labels: dict[str, int] = {}
    texts = [canonical_text(value) for value in values]
    return [
        FieldBallot(labels.setdefault(text, len(labels)), fields_of(value))
        for text, value in zip(texts, values, strict=True)
    ]


def selected(values: Sequence[Any]) -> int:
    ballots = documents(*values)
    return vote_on_fields([ballot.fields for ballot in ballots]).select(ballots)


def test_the_document_with_most_winning_fields_is_selected() -> None:
    values = [{"a": 1, "b": 2, "c": 9}, {"a": 1, "b": 8, "c": 3}, {"a": 7, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 4}]
    assert selected(values) == 0
    vote = vote_on_fields([ballot.fields for ballot in documents(*values)])
    assert vote.agreement == {"/a": 0.75, "/b": 0.75, "/c": 0.5}


def test_a_missing_field_is_a_vote() -> None:
    values = [{"a": 1, "b": 2}, {"a": 1}, {"a": 1}]
    assert selected(values) == 1
    assert vote_on_fields([ballot.fields for ballot in documents(*values)]).agreement == {"/a": 1.0}


def test_of_equals_the_commonest_document_wins_then_the_first() -> None:
    assert selected([{"a": 1}, {"a": 2}, {"a": 2}]) == 1
    assert selected([{"a": 1}, {"a": 2}]) == 0


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12")), min_size=1, max_size=6))
def test_each_field_is_won_by_its_commonest_value_or_absence(documents: list[dict[str, str]]) -> None:
    pointers = dict.fromkeys(pointer for fields in documents for pointer in fields)
    ballots = {pointer: Counter(fields.get(pointer) for fields in documents) for pointer in pointers}
    winners = {pointer: votes.most_common(1)[0] for pointer, votes in ballots.items()}
    vote = vote_on_fields(documents)
    assert vote.winners == {pointer: value for pointer, (value, _) in winners.items()}
    shares = {pointer: count / len(documents) for pointer, (value, count) in winners.items() if value is not None}
    assert vote.agreement == shares
    for fields in documents:
        assert vote.agreeing(fields) == sum(fields.get(p) == value for p, value in vote.winners.items())


class Asked(dict[str, str]):
    """Fields that count how often they are asked for one."""

    times = 0

    def __getitem__(self, pointer: str) -> str:
        self.times += 1
        return super().__getitem__(pointer)

    def get(self, pointer: str, default: Any = None) -> Any:
        self.times += 1
        return super().get(pointer, default)


def test_the_field_vote_asks_no_document_for_the_fields_of_others() -> None:
    asked = [Asked({f"/{number}/{at}": "1e0" for at in range(100)}) for number in range(64)]
    ballots = [FieldBallot(number, fields) for number, fields in enumerate(asked)]
    assert vote_on_fields(asked).select(ballots) == 0
    assert max(fields.times for fields in asked) <= 2 * 100


def test_the_field_vote_is_right_as_often_as_arithmetic_says() -> None:
    """Three documents of two fields, each field wrong with probability 1/5 in its own way.

    All 64 combinations are tried. With w of three values wrong in different ways, the first of three different values
    wins, so a field's vote is right unless the right value has no majority. A document is right if both its fields are.
    """
    wrong, total, single = Fraction(1, 5), Fraction(0), Fraction(0)
    for errors in itertools.product([False, True], repeat=6):
        weight = math.prod(wrong if error else 1 - wrong for error in errors)
        values = [
            {"a": f"wrong {i}" if errors[2 * i] else "right", "b": f"wrong {i}" if errors[2 * i + 1] else "right"}
            for i in range(3)
        ]
        is_right = values[selected(values)] == {"a": "right", "b": "right"}
        total += weight * is_right
        single += weight * (values[0] == {"a": "right", "b": "right"})
        # A right document wins if both right values have a majority, or it is the first of three different ones.
        right = [value for value in values if value == {"a": "right", "b": "right"}]
        majorities = all(sum(value[key] == "right" for value in values) >= 2 for key in "ab")
        if right and majorities:
            assert is_right
    p = 1 - wrong
    both = p * p
    assert single == both  # 16/25
    # two or three right documents always win; so does one, with a majority on both fields (the others each half wrong)
    half = p * wrong  # right in exactly this one field
    sure = both**3 + 3 * both**2 * (1 - both) + 3 * both * (2 * half * half)
    first = both * (wrong * wrong * (1 - both) + (1 - both) * wrong * wrong - wrong**4 + 2 * half * half)
    assert total >= sure > single
    assert total == sure + first


# Votes on tool calls


def ballots(*replies: Sequence[tuple[str, str]] | int | None, exclude: Sequence[str] = ()) -> list[ToolBallot]:
    """Return ballots of calls, or of the label of a reply without calls."""
    schemas, labels, made = ToolSchemas({"weather": SCHEMA}, exclude), dict[CallSet, int](), []
    for reply in replies:
        if reply is None or isinstance(reply, int):
            made.append(ToolBallot(reply))
            continue
        calls = schemas.read(reply)
        assert calls is not None
        made.append(ToolBallot(labels.setdefault(calls, 100 + len(labels)), calls))
    return made


def weather(city: str, **more: Any) -> list[tuple[str, str]]:
    return [("weather", json.dumps({"city": city, **more}))]


def test_the_vote_is_first_on_whether_to_call() -> None:
    """No call has most votes of a single kind, but more replies call."""
    assert select_by_calls(ballots(None, None, weather("Rome"), weather("Oslo"), [("time", "{}")])) == 2
    assert select_by_calls(ballots(None, 4, 4, weather("Rome"), weather("Rome"))) == 1


def test_the_vote_is_then_on_the_multiset_of_names() -> None:
    rome, both = weather("Rome"), [*weather("Rome"), *weather("Oslo")]
    swapped = both[::-1]
    assert select_by_calls(ballots(rome, rome, both, swapped, [("time", "{}"), *weather("x"), *rome], swapped)) == 2
    assert select_by_calls(ballots([("time", "{}")], weather("Rome"), weather("Oslo"))) == 1


def test_the_vote_is_then_on_the_arguments_by_their_schema() -> None:
    assert select_by_calls(ballots(weather("Oslo"), weather("Rome"), weather("Rome", unit="C", days=1.0))) == 1
    assert select_by_calls(ballots(weather("Rome", days=2), weather("Oslo", days=3), weather("Rome", days=3))) == 2


def test_a_tie_of_arguments_goes_to_the_reply_that_agrees_in_most_of_them() -> None:
    a, b, c = weather("Rome", days=2), weather("Rome", days=2, unit="F"), weather("Oslo", days=5)
    assert select_by_calls(ballots(c, a, b)) == 1
    assert select_by_calls(ballots(c, c, a, a, b)) == 2  # the arguments of `b` break the tie


def test_excluded_arguments_are_not_compared() -> None:
    replies = [weather("Oslo", note="x"), weather("Rome", note="a"), weather("Rome", note="b")]
    assert select_by_calls(ballots(*replies, exclude=["note"])) == 1
    assert select_by_calls(ballots(*replies, exclude=["weather.note"])) == 1
    equal = ballots(replies[1], replies[2], exclude=["weather.note"])
    assert equal[0].calls == equal[1].calls
    assert len({ballot.calls for ballot in ballots(*replies[1:], exclude=["time.note"])}) == 2


def test_arguments_that_are_not_json_do_not_vote_and_none_are_an_empty_object() -> None:
    schemas = ToolSchemas({})
    assert schemas.read([("f", "{}"), ("g", "{oops")]) is None
    assert schemas.read([("f", " ")]) == schemas.read([("f", "{}")])
    assert schemas.read([("f", '{"a":1,"a":2}')]) is None


def test_the_tool_vote_is_right_as_often_as_the_binomial_says() -> None:
    """Five calls, each right with probability 3/5, else wrong in its own way: right from two equal ones on."""
    right, wrong = Fraction(3, 5), Fraction(2, 5)
    total = Fraction(0)
    for pattern in itertools.product([True, False], repeat=5):
        replies = [weather("Rome" if ok else f"wrong {i}") for i, ok in enumerate(pattern)]
        is_right = pattern[select_by_calls(ballots(*replies))]
        total += is_right * math.prod(right if ok else wrong for ok in pattern)
    at_least_two = 1 - wrong**5 - 5 * right * wrong**4
    assert total == at_least_two + right * wrong**4  # and one, if it comes first
    assert total > right


@given(st.lists(st.sampled_from([None, 1, "Rome", "Oslo", "two"]), min_size=1, max_size=8), st.randoms())
def test_the_selected_reply_is_one_of_the_majority_at_each_level(kinds: list[Any], chance: random.Random) -> None:
    calls = {"Rome": weather("Rome"), "Oslo": weather("Oslo"), "two": [*weather("a"), *weather("b")]}
    replies = [calls.get(kind, kind) for kind in kinds]
    pick = kinds[select_by_calls(ballots(*replies))]
    calling = [kind for kind in kinds if isinstance(kind, str)]
    if 2 * len(calling) != len(kinds):
        assert isinstance(pick, str) == (2 * len(calling) > len(kinds))
    if isinstance(pick, str):
        two = calling.count("two")
        if 2 * two != len(calling):
            assert (pick == "two") == (2 * two > len(calling))
