"""Refuse values that vLLM takes and then fails on with status 500, or compiles for so long that others wait.

The bounds were found by sending such values to vLLM 0.32. What cannot be decided here is up to vLLM: a failure of a
request's own does the upstream's other users no harm (`breaker.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from proxy.errors import BadRequest, clipped

MOST_INT: Final = 2**31 - 1
"""Largest value of a number of tokens, or of repetitions."""
MOST_STOP: Final = 1024
"""Characters of a stop string, which is sent with each request for a branch."""
MOST_WORD: Final = 128
"""Characters of one of the `bad_words`, each of which vLLM turns into token ids twice while others wait."""
MOST_LIST: Final[Mapping[str, int]] = {
    "stop_token_ids": 1024,
    "logprob_token_ids": 1024,
    "bad_words": 1000,
    "allowed_token_ids": 2**20,
}
"""Entries of fields that are lists."""
MOST_CONSTRAINT: Final = 65_536
"""Bytes of a grammar, a schema or a list of choices."""
MOST_CONSTRAINTS: Final = 2**20
"""Bytes of all grammars and schemas of a request, which are looked through while other requests wait."""
MOST_TEXT: Final = 32_768
"""Characters of one text in it, whose compilation takes time that grows with the square."""
MOST_CHOICES: Final = 5000
"""Choices, and values of an `enum`."""
MOST_ALTERNATIVES: Final = 500
"""Alternatives of an `anyOf`, `oneOf` or `allOf`."""
_INTEGERS: Final = (
    *("top_k", "min_tokens", "thinking_token_budget", "stream_interval", "max_tool_calls"),
    *("repetition_detection.max_pattern_size", "repetition_detection.min_pattern_size"),
    "repetition_detection.min_count",
)
_TEXTS: Final = frozenset({"messages", "prompt", "input", "tokens"})
"""Fields that vLLM turns into token ids before its engine sees them."""
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
"""Fields that may be JSON in a text."""
_GUIDED: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern")
_REPEATED: Final = re.compile(r"\{\s{0,9}(\d+)\s{0,9}(?:,\s{0,9}(\d+)?\s{0,9})?\}")
_NUMBER: Final = re.compile(r"[+-]?[0-9]+")


class _Value(NamedTuple):
    """A value somewhere in a field."""

    key: str  # its name in the object it stands in, or that of the list it stands in; empty within a literal
    value: Any
    is_literal: bool = False  # it is, or belongs to, a value that a schema names as such


def check(body: Mapping[str, Any]) -> None:
    """Raise BadRequest, naming the field, for a request that vLLM would fail on."""
    for name in _INTEGERS:
        _check_integer(body, name)
    for name, value in body.items():
        if name not in _TEXTS and isinstance(value, dict | list) and not _is_packable(value):
            raise _wrong(name, "has an integer of more than 64 bits")
    stops = body.get("stop")
    for stop in stops if isinstance(stops, list) else [stops]:
        if isinstance(stop, str) and len(stop) > MOST_STOP:
            raise _wrong("stop", f"has a text of {len(stop)} characters; at most {MOST_STOP} are accepted")
    for name, most in MOST_LIST.items():
        value = body.get(name)
        if isinstance(value, list) and len(value) > most:
            raise _wrong(name, f"has {len(value)} entries; at most {most} are accepted")
    for word in _listed(body.get("bad_words")):
        if isinstance(word, str) and len(word) > MOST_WORD:
            raise _wrong("bad_words", f"has a text of {len(word)} characters; at most {MOST_WORD} are accepted")
    total = 0
    for name, value in _constraints(body):
        total += _check_constraint(name, value)
        if total > MOST_CONSTRAINTS:
            raise _wrong(name, f"is one of constraints with over {MOST_CONSTRAINTS} bytes in all, the most accepted")


def _check_integer(body: Mapping[str, Any], path: str) -> None:
    name, _, member = path.partition(".")
    value = body.get(name)
    if member:
        value = value.get(member) if isinstance(value, dict) else None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):  # vLLM reads numbers from texts
        value = _number(value.strip())
    if isinstance(value, int | float) and not -MOST_INT <= value <= MOST_INT:
        raise _wrong(path, f"is {_shown(value)}; at most {MOST_INT} is accepted")


def _constraints(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a reply must conform to, with the fields it stands in."""
    for name, value in _members(body.get("structured_outputs")):
        yield f"structured_outputs.{name}", {name: _parsed(value) if name in _JSON else value}
    for name in _GUIDED:
        if name in body:
            yield name, {name: _parsed(body[name]) if name in _JSON else body[name]}
    for name, value in (("response_format", body.get("response_format")), *_members(body.get("text"))):
        if isinstance(value, dict):
            yield name if name == "response_format" else f"text.{name}", value
    for index, tool in enumerate(_listed(body.get("tools"))):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("parameters"), dict):
            yield f"tools.{index}.function.parameters", function["parameters"]


def _is_packable(value: Any) -> bool:
    """Whether vLLM can hand `value` to its engine, as MessagePack, which has no integers of more than 64 bits."""
    try:
        msgspec.msgpack.encode(value)
    except OverflowError:
        return False
    return True


def _check_constraint(name: str, value: Any) -> int:
    """Return the bytes that a grammar or schema has. Raises BadRequest if it has too many, or something wrong in it."""
    size = len(msgspec.json.encode(value))
    if size > MOST_CONSTRAINT:
        raise _wrong(name, f"has {size} bytes; at most {MOST_CONSTRAINT} are accepted")
    for key, found, _ in _walk("", value):
        if isinstance(found, str):
            _check_text(name, key, found)
        elif key in _COUNTS and isinstance(found, int | float) and not 0 <= found <= MOST_INT:
            raise _wrong(name, f"has the {key} {_shown(found)}; it must be from 0 to {MOST_INT}")
        elif isinstance(found, list):
            most = MOST_ALTERNATIVES if key in _ALTERNATIVES else MOST_CHOICES
            if len(found) > most:
                raise _wrong(name, f"has {len(found)} entries in {clipped(key, 80)!r}; at most {most} are accepted")
        elif key == "patternProperties" and isinstance(found, dict):
            for pattern in found:
                _check_text(name, "pattern", pattern)
    return size


def _check_text(name: str, key: str, text: str) -> None:
    if len(text) > MOST_TEXT:
        raise _wrong(name, f"has a text of {len(text)} characters; at most {MOST_TEXT} are accepted")
    if "\0" in text:
        raise _wrong(name, "has a text with the character NUL")
    is_pattern = key in _PATTERNS
    if is_pattern and (problem := _problem(text)):
        raise _wrong(name, f"has the pattern {clipped(text, 80)!r}, {problem}")
    if is_pattern or key.endswith("grammar"):
        for counts in _REPEATED.finditer(text):
            if any(_number(count) > MOST_INT for count in counts.groups() if count):
                raise _wrong(name, f"repeats {clipped(counts[0], 80)}; at most {MOST_INT} times are accepted")


def _problem(pattern: str) -> str:
    """Return what makes `pattern` no regular expression in any dialect; empty if nothing obvious does."""
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
                return "which closes a group that is not open"
    if is_escaped:
        return "which ends with a backslash"
    if is_class:
        return "which does not close a class"
    return "which does not close a group" if depth else ""


def _walk(key: str, value: Any) -> Iterator[_Value]:
    """Yield `value` and all that is in it, keys included. Numbers in lists are left out unless they are counts."""
    waiting = [_Value(key, value)]
    while waiting:
        found = waiting.pop()
        yield found
        is_literal = found.is_literal or found.key in _LITERALS
        if isinstance(found.value, dict):
            waiting += [_Value("", name) for name in found.value]
            waiting += [_Value("" if is_literal else name, member, is_literal) for name, member in found.value.items()]
        elif isinstance(found.value, list):
            key = "" if is_literal else found.key
            members = found.value if key in _COUNTS else filter(_is_text_or_more, found.value)
            waiting += [_Value(key, member, is_literal) for member in members]


def _is_text_or_more(value: object) -> bool:
    return isinstance(value, str | dict | list)


def _parsed(value: Any) -> Any:
    """Return a value that may be JSON in a text as what it says, if that can be read."""
    if not isinstance(value, str) or len(value) > MOST_CONSTRAINT:
        return value
    try:
        return msgspec.json.decode(value)
    except (ValueError, RecursionError):
        return value


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _members(value: object) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _number(digits: str) -> int:
    """Return a number, or one that is too large for any field if it has many digits."""
    return int(digits) if len(digits) < 40 else 10**40


def _shown(number: float) -> str:
    if isinstance(number, float):
        return format(number, "g")
    return str(number) if abs(number) < 10**24 else "one of too many digits"


def _wrong(name: str, problem: str) -> BadRequest:
    return BadRequest(f"{name} {problem}", param=name)
