"""Examples of how a function is called, and what it returns, in the text of a request.

They are read as literals, never evaluated: `>>> f(1, 2)` with its result, `f(1, 2) == 3`, `Input: … Output: …`.
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

from controllers.sandbox.functions import NotCallable, short_text

MAX_EXAMPLES: Final = 32
"""Maximum number of examples with which a function is called."""
MAX_ARGUMENT_CHARS: Final = 40_000
"""Maximum number of characters of the arguments of all examples that are read in a text."""
MAX_TEXT_CHARS: Final = 20_000
"""Number of characters, from the end of a request, that are searched for examples."""
MAX_PIECES: Final = 500
"""Maximum number of texts that are read as calls."""
MAX_LINE_CHARS: Final = 1_000
"""Maximum number of characters of a line that is read as an example."""

_DOCTEST: Final = ">>>"
_SPAN: Final = re.compile(r"`([^`\n]+)`")
_INPUT: Final = re.compile(r"\W{0,20}\binputs?\W{0,5}[:=]", re.IGNORECASE)
_OUTPUT: Final = re.compile(r"\boutputs?\W{0,5}[:=]", re.IGNORECASE)
_DEFINED: Final = re.compile(r"\bdef\s+([A-Za-z_]\w*)\s*\(")
_UNREADABLE: Final = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
"""Errors of reading a text as a literal."""


class CodeExample(NamedTuple):
    """One call of a function."""

    arguments: str  # literal of a pair: a tuple of arguments, and a dictionary of keyword arguments
    expected: str | None = None  # text of the value that the request states, as `short_text` writes it


class CodeTask(NamedTuple):
    """A request whose replies are compared by what their functions return."""

    function: str  # its name; empty if unknown
    examples: Sequence[CodeExample]


class _NamedExample(NamedTuple):
    function: str  # empty if the example does not name one
    example: CodeExample


def as_arguments(args: Sequence[Any], keywords: Mapping[str, Any] | None = None) -> str | None:
    """Return the literal of arguments; None if they have none, as infinity and very deep lists have none."""
    text = repr((tuple(args), dict(keywords or {})))
    try:
        ast.literal_eval(text)
    except _UNREADABLE:
        return None
    return text


def read_examples(text: str, function: str = "") -> CodeTask:
    """Return the examples in a request, each call once. `function` is the name that the request gives, if it does.

    Examples that name a function count before those that only give its input. If they name several, the most frequent
    counts.
    """
    with warnings.catch_warnings(action="ignore"):  # about escapes in the client's strings
        return _read_lines(text[-MAX_TEXT_CHARS:].splitlines(), function)


def _read_lines(lines: Sequence[str], function: str) -> CodeTask:
    named = [each for each in _calls(lines) if function in ("", each.function)]
    if named:
        name = Counter(each.function for each in named).most_common(1)[0][0]
        return CodeTask(name, _distinct([each.example for each in named if each.function == name]))
    defined = next(filter(None, map(_DEFINED.search, lines)), None)
    name = function or (defined[1] if defined else "")
    return CodeTask(name, _distinct(_inputs(lines)))


def _distinct(examples: Sequence[CodeExample]) -> Sequence[CodeExample]:
    """Return each call once, with the first value that is stated for it, as many as are used."""
    calls: dict[str, CodeExample] = {}
    chars = 0
    for example in examples:
        chars += len(example.arguments)
        if chars > MAX_ARGUMENT_CHARS:
            break
        known = calls.setdefault(example.arguments, example)
        if known.expected is None:
            calls[example.arguments] = example
    return list(calls.values())[:MAX_EXAMPLES]


def _calls(lines: Sequence[str]) -> Iterator[_NamedExample]:
    """Yield the calls in doctests, and in comparisons that a line or a code span consists of."""
    for piece, following in islice(_pieces(lines), MAX_PIECES):
        call = _read_call(piece)
        if call is None:
            continue
        if following is not None:
            expected = call.example.expected or _expected(following)
            call = call._replace(example=call.example._replace(expected=expected))
        elif call.example.expected is None:
            continue
        yield call


def _pieces(lines: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield texts that may be calls, each with the line after it if it is a doctest."""
    for at, line in enumerate(lines):
        stripped = line.strip()
        if stripped.startswith(_DOCTEST):
            yield stripped.removeprefix(_DOCTEST).strip(), lines[at + 1].strip() if at + 1 < len(lines) else ""
            continue
        for piece in (stripped.lstrip("-*• "), *_SPAN.findall(line)):
            if "==" in piece:
                yield piece.strip(), None


def _read_call(text: str) -> _NamedExample | None:
    """Read `f(1, 2)` or `f(1, 2) == 3`; None if it is anything else, or its arguments are no literals."""
    if len(text) > MAX_LINE_CHARS or "(" not in text:
        return None
    try:
        node = _expression(text)
        expected = None
        if isinstance(node, ast.Compare):
            if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq):
                return None
            expected, node = short_text(ast.literal_eval(node.comparators[0])), node.left
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or hasattr(builtins, node.func.id):
            return None
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
        if len(keywords) != len(node.keywords):
            return None
        arguments = as_arguments([ast.literal_eval(arg) for arg in node.args], keywords)
    except (*_UNREADABLE, NotCallable):
        return None
    return None if arguments is None else _NamedExample(node.func.id, CodeExample(arguments, expected))


def _expression(text: str) -> ast.expr:
    """Return the expression that a text is, or that it asserts. Raises SyntaxError."""
    (statement,) = ast.parse(text).body
    if isinstance(statement, ast.Assert):
        return statement.test
    if isinstance(statement, ast.Expr):
        return statement.value
    raise SyntaxError("neither an expression nor an assertion")


def _inputs(lines: Sequence[str]) -> list[CodeExample]:
    """Return the examples of the form `Input: … Output: …`; none if they differ in the number of arguments."""
    examples: list[tuple[int, CodeExample]] = []
    for at, line in enumerate(lines):
        if len(line) > MAX_LINE_CHARS:
            continue
        match = _INPUT.match(line)
        if match is None:
            continue
        given = line[match.end() :]
        following = next((later for later in lines[at + 1 : at + 3] if later.strip()), "")[:MAX_LINE_CHARS]
        rest = given if _OUTPUT.search(given) else f"{given}\n{following}"
        output = _OUTPUT.search(rest)
        if output is None:
            continue
        args = _read_arguments(rest[: output.start()].rstrip().rstrip(",;*_-> \t\n"))
        if args is not None and (arguments := as_arguments(args)) is not None:
            examples.append((len(args), CodeExample(arguments, _expected(rest[output.end() :]))))
    return [example for _, example in examples] if len({count for count, _ in examples}) == 1 else []


def _read_arguments(text: str) -> list[Any] | None:
    """Read `3, "a"` or `n = 3, text = "a"` as arguments in order; None if it is anything else."""
    try:
        node = ast.parse(f"f({_bare(text)})", mode="eval").body
        if not isinstance(node, ast.Call) or (node.args and node.keywords):
            return None
        if any(keyword.arg is None for keyword in node.keywords):
            return None
        values = node.args or [keyword.value for keyword in node.keywords]
        return [ast.literal_eval(value) for value in values] or None
    except _UNREADABLE:
        return None


def _bare(text: str) -> str:
    """Return a text without the full stop at its end, and without marks of code and emphasis around it."""
    return text.strip().rstrip(".").strip("`* ")


def _expected(text: str) -> str | None:
    """Return the text of a stated value; None if it is no literal."""
    try:
        return short_text(ast.literal_eval(_bare(text[: MAX_LINE_CHARS + 1])))
    except (*_UNREADABLE, NotCallable):
        return None
