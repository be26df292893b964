"""Refuse field values that vLLM accepts but cannot serve.

For some values vLLM fails with status 500, and some it compiles for so long that other requests wait. The limits were
found by sending such values to vLLM 0.32. Values that cannot be checked here are forwarded. If vLLM fails on one, the
circuit breaker does not open, so other requests are not affected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from proxy.errors import BadRequest, clipped

MAX_INT: Final = 2**31 - 1
"""Largest value of a field that counts tokens or repetitions."""
MAX_STOP: Final = 1024
"""Maximum number of characters in a stop string. It is sent with every request for a branch."""
MAX_WORD: Final = 128
"""Maximum number of characters in a bad word. vLLM tokenises each of them twice while other requests wait."""
MAX_LIST: Final[Mapping[str, int]] = {
    "stop_token_ids": 1024,
    "logprob_token_ids": 1024,
    "bad_words": 1000,
    "allowed_token_ids": 2**20,
}
"""Maximum number of entries in list fields."""
MAX_CONSTRAINT: Final = 65_536
"""Maximum number of bytes in a grammar, a schema or a list of choices."""
MAX_CONSTRAINTS: Final = 2**20
"""Maximum number of bytes in all grammars and schemas of a request. Other requests wait while they are checked."""
MAX_TEXT: Final = 32_768
"""Maximum number of characters in a string of a grammar or schema. Compilation time grows with the square of it."""
MAX_CHOICES: Final = 5000
"""Maximum number of choices, and of values in an `enum`."""
MAX_ALTERNATIVES: Final = 500
"""Maximum number of alternatives in an `anyOf`, `oneOf` or `allOf`."""
_INTEGERS: Final = (
    *("top_k", "min_tokens", "thinking_token_budget", "stream_interval", "max_tool_calls"),
    *("repetition_detection.max_pattern_size", "repetition_detection.min_pattern_size"),
    "repetition_detection.min_count",
)
_TEXTS: Final = frozenset({"messages", "prompt", "input", "tokens"})
"""Fields that vLLM tokenises before its engine sees them."""
_COUNTS: Final = frozenset(
    {
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        *("minContains", "maxContains"),
    }
)
_LITERALS: Final = frozenset({"const", "enum", "default", "examples"})
_ALTERNATIVES: Final = frozenset({"anyOf", "oneOf", "allOf"})
_PATTERNS: Final = frozenset({"regex", "guided_regex", "pattern", "whitespace_pattern", "guided_whitespace_pattern"})
_JSON: Final = frozenset({"json", "guided_json", "structural_tag"})
"""Fields that may hold JSON in a string."""
_GUIDED: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern")
_REPEATED: Final = re.compile(r"\{\s{0,9}(\d+)\s{0,9}(?:,\s{0,9}(\d+)?\s{0,9})?\}")
_NUMBER: Final = re.compile(r"[+-]?[0-9]+")
_CHECKED: Final = frozenset(
    {
        *(path.partition(".")[0] for path in _INTEGERS),
        *("stop", *MAX_LIST),
        *("structured_outputs", "response_format", "text", "tools", *_GUIDED),
    }
)
"""Fields whose values are checked, whatever their type. Of all other fields only lists and objects are."""

_CONTAINERS: Final = (dict, list)


class _Value(NamedTuple):
    """A value nested in a field."""

    key: str  # key of the value, or of the list that contains it; empty within a literal
    value: Any
    is_literal: bool = False  # whether it is inside a literal of a schema, such as `const` or `enum`


def check(body: Mapping[str, Any]) -> None:
    """Raise BadRequest, naming the field, if vLLM would fail on the request."""
    if not any(name in _CHECKED or (name not in _TEXTS and isinstance(body[name], _CONTAINERS)) for name in body):
        return
    for name in _INTEGERS:
        _check_integer(body, name)
    for name, value in body.items():
        if name not in _TEXTS and isinstance(value, dict | list) and not _is_packable(value):
            raise _wrong(name, "contains an integer of more than 64 bits; send a smaller one")
    stops = body.get("stop")
    for stop in stops if isinstance(stops, list) else [stops]:
        if isinstance(stop, str) and len(stop) > MAX_STOP:
            raise _wrong("stop", f"has a string of {len(stop)} characters; at most {MAX_STOP} are accepted")
    for name, most in MAX_LIST.items():
        value = body.get(name)
        if isinstance(value, list) and len(value) > most:
            raise _wrong(name, f"has {len(value)} entries; at most {most} are accepted")
    for word in _as_list(body.get("bad_words")):
        if isinstance(word, str) and len(word) > MAX_WORD:
            raise _wrong("bad_words", f"has a string of {len(word)} characters; at most {MAX_WORD} are accepted")
    total = 0
    for name, value in _constraints(body):
        total += _check_constraint(name, value)
        if total > MAX_CONSTRAINTS:
            raise _wrong(name, f"brings all grammars and schemas to over {MAX_CONSTRAINTS} bytes in total; send fewer")


def _check_integer(body: Mapping[str, Any], path: str) -> None:
    name, _, member = path.partition(".")
    value = body.get(name)
    if member:
        value = value.get(member) if isinstance(value, dict) else None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):  # vLLM reads numbers from strings
        value = _number(value.strip())
    if isinstance(value, int | float) and not -MAX_INT <= value <= MAX_INT:
        raise _wrong(path, f"is {_shown(value)}; it must be from -{MAX_INT} to {MAX_INT}")


def _constraints(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each field that constrains the format of a reply: grammars, schemas and choices."""
    for name, value in _items(body.get("structured_outputs")):
        yield f"structured_outputs.{name}", {name: _parsed(value) if name in _JSON else value}
    for name in _GUIDED:
        if name in body:
            yield name, {name: _parsed(body[name]) if name in _JSON else body[name]}
    for name, value in (("response_format", body.get("response_format")), *_items(body.get("text"))):
        if isinstance(value, dict):
            yield name if name == "response_format" else f"text.{name}", value
    for index, tool in enumerate(_as_list(body.get("tools"))):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("parameters"), dict):
            yield f"tools.{index}.function.parameters", function["parameters"]


def _is_packable(value: Any) -> bool:
    """Return whether vLLM can send `value` to its engine, as MessagePack with integers of at most 64 bits."""
    try:
        msgspec.msgpack.encode(value)
    except OverflowError:
        return False
    return True


def _check_constraint(name: str, value: Any) -> int:
    """Return the size of a grammar or schema in bytes. Raises BadRequest if it is too large or invalid."""
    size = len(msgspec.json.encode(value))
    if size > MAX_CONSTRAINT:
        raise _wrong(name, f"has {size} bytes; at most {MAX_CONSTRAINT} are accepted")
    for key, nested, _ in _walk("", value):
        if isinstance(nested, str):
            _check_text(name, key, nested)
        elif key in _COUNTS and isinstance(nested, int | float) and not 0 <= nested <= MAX_INT:
            raise _wrong(name, f"has the {key} {_shown(nested)}; it must be from 0 to {MAX_INT}")
        elif isinstance(nested, list):
            most = MAX_ALTERNATIVES if key in _ALTERNATIVES else MAX_CHOICES
            if len(nested) > most:
                raise _wrong(name, f"has {len(nested)} entries in {clipped(key, 80)!r}; at most {most} are accepted")
        elif key == "patternProperties" and isinstance(nested, dict):
            for pattern in nested:
                _check_text(name, "pattern", pattern)
    return size


def _check_text(name: str, key: str, text: str) -> None:
    if len(text) > MAX_TEXT:
        raise _wrong(name, f"has a string of {len(text)} characters; at most {MAX_TEXT} are accepted")
    if "\0" in text:
        raise _wrong(name, "has a string with a NUL character; remove it")
    is_pattern = key in _PATTERNS
    if is_pattern and (problem := _pattern_problem(text)):
        raise _wrong(name, f"has the invalid pattern {clipped(text, 80)!r}: it {problem}")
    if is_pattern or key.endswith("grammar"):
        for counts in _REPEATED.finditer(text):
            if any(_number(count) > MAX_INT for count in counts.groups() if count):
                raise _wrong(name, f"repeats {clipped(counts[0], 80)}; at most {MAX_INT} repetitions are accepted")


def _pattern_problem(pattern: str) -> str:
    """Return why `pattern` is not a regular expression in any dialect; empty if nothing obvious is wrong."""
    depth, is_class, is_escaped, begin = 0, False, False, 0
    for at, char in enumerate(pattern):
        if is_escaped:
            is_escaped = False
        elif char == "\\":
            is_escaped = True
        elif is_class:
            is_class = char != "]" or at == begin + 1 or (at == begin + 2 and pattern[begin + 1] == "^")
        elif char == "[":
            is_class, begin = True, at
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth < 0:
                return "closes a group that is not open"
    if is_escaped:
        return "ends with a backslash"
    if is_class:
        return "does not close a character class"
    return "does not close a group" if depth else ""


def _walk(key: str, value: Any) -> Iterator[_Value]:
    """Yield `value` and everything nested in it, keys included. Numbers in lists are skipped unless they are counts."""
    waiting = [_Value(key, value)]
    while waiting:
        node = waiting.pop()
        yield node
        is_literal = node.is_literal or node.key in _LITERALS
        if isinstance(node.value, dict):
            waiting += [_Value("", name) for name in node.value]
            waiting += [_Value("" if is_literal else name, member, is_literal) for name, member in node.value.items()]
        elif isinstance(node.value, list):
            key = "" if is_literal else node.key
            members = node.value if key in _COUNTS else filter(_is_string_or_container, node.value)
            waiting += [_Value(key, member, is_literal) for member in members]


def _is_string_or_container(value: object) -> bool:
    return isinstance(value, str | dict | list)


def _parsed(value: Any) -> Any:
    """Return the JSON value in a string; `value` itself if it is not a string or cannot be parsed."""
    if not isinstance(value, str) or len(value) > MAX_CONSTRAINT:
        return value
    try:
        return msgspec.json.decode(value)
    except (ValueError, RecursionError):
        return value


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _items(value: object) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _number(digits: str) -> int:
    """Return the integer in `digits`. For 40 digits or more, return a number that is too large for any field."""
    return int(digits) if len(digits) < 40 else 10**40


def _shown(number: float) -> str:
    if isinstance(number, float):
        return format(number, "g")
    return str(number) if abs(number) < 10**24 else "a number with too many digits"


def _wrong(name: str, problem: str) -> BadRequest:
    return BadRequest(f"{name} {problem}", param=name)
