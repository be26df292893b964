"""Call functions of foreign code in a sandbox process, and write their results as text.

Like `process.py` this protects nothing: the seal does. Only functions without imports and I/O can be called, so that
equal texts mean equal behaviour.
"""

from __future__ import annotations
import __future__

import ast
import builtins
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from types import FunctionType
from typing import Any, Final

from controllers.sandbox.frames import MAX_COMPLAINT_CHARS, BadFrame, decode_text, decode_texts, printable

RETURNED, RAISED = "=", "!"
"""First character of an outcome: a value as text, or the name of an exception's type."""
MAX_TEXT: Final = 200
"""Maximum characters of a value's text. A longer one is cut, and ends in a hash that tells it apart."""
MAX_DEPTH: Final = 100
"""Maximum levels of nested values."""
MAX_DIGITS_BITS: Final = 10_000
"""Bits of the largest whole number that is written in decimal digits."""
IGNORED_IMPORTS: Final = frozenset({"typing", "__future__"})
"""Modules whose imports at the top of a reply are left out, because annotations are not evaluated."""

_WITHHELD: Final = frozenset(
    {
        *("open", "input", "print", "exec", "eval", "compile", "__import__", "breakpoint", "help"),
        *("exit", "quit", "copyright", "credits", "license"),
    }
)
"""Built-in functions that do I/O or run code. Calling one raises NameError."""
_KEPT: Final = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
"""Statements at the top of a reply that are executed. Calls, tests and prints are not."""


class NotCallable(Exception):
    """The code has no function that can be called, or its results cannot be compared."""


def call_function(blocks: Sequence[str], name: str, inputs: Sequence[str]) -> list[str]:
    """Return the outcome of a function for each of `inputs`, which are literals of arguments and keyword arguments.

    The function is `name`, or the last one if that is empty, of the last of `blocks` that defines it. Raises
    NotCallable, and MemoryError.
    """
    function = _load(blocks, name)
    return [_outcome(function, arguments) for arguments in inputs]


def plain_text(value: object, depth: int = 0) -> str:
    """Return the text of a plain value; equal values have equal texts. Raises NotCallable for other objects.

    Numbers are compared by value and fractions to twelve digits. Lists and tuples differ, and so do 1 and True.
    """
    kind = type(value)
    if depth > MAX_DEPTH:
        raise NotCallable("a value is nested too deeply")
    if value is None or kind is bool:
        return str(value)
    if kind is int or kind is float:
        return _number_text(value)  # type: ignore[arg-type]
    if isinstance(value, str | bytes) and kind in (str, bytes):
        return ascii(value)
    if isinstance(value, dict) and kind is dict:
        pairs = (f"{plain_text(key, depth + 1)}: {plain_text(member, depth + 1)}" for key, member in value.items())
        return f"{{{', '.join(sorted(pairs))}}}"
    if isinstance(value, set | frozenset) and kind in (set, frozenset):
        return f"set({', '.join(sorted(plain_text(member, depth + 1) for member in value))})"
    if isinstance(value, list | tuple) and kind in (list, tuple):
        members = ", ".join(plain_text(member, depth + 1) for member in value)
        return f"[{members}]" if kind is list else f"({members})"
    raise NotCallable(f"a value of type {kind.__name__} cannot be compared")


def short_text(value: object) -> str:
    """Return the text of a plain value, cut to MAX_TEXT characters. Raises like `plain_text`."""
    text = plain_text(value)
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT - 21]}... #{blake2b(text.encode(), digest_size=8).hexdigest()}"


def _number_text(value: float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= MAX_DIGITS_BITS else hex(value)
    return format(value, ".12g")


def _load(blocks: Sequence[str], name: str) -> Callable[..., object]:
    """Execute the last block that defines the function, and return it."""
    for block in reversed(blocks):
        try:
            tree = ast.parse(block)
        except (SyntaxError, ValueError, RecursionError):
            continue
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if not defined or (name and name not in defined):
            continue
        namespace: dict[str, Any] = {"__builtins__": _builtins(), "__name__": "reply"}
        exec(_compiled(tree), namespace)
        function = namespace.get(name or defined[-1])
        if not isinstance(function, FunctionType):
            raise NotCallable("its function is replaced by something else")
        return function
    raise NotCallable("it defines no such function")


def _compiled(tree: ast.Module) -> Any:
    """Return the code of a block without its imports of `typing` and without calls at its top."""
    body = [node for node in tree.body if not _is_ignored_import(node)]
    if any(isinstance(node, ast.Import | ast.ImportFrom) for part in body for node in ast.walk(part)):
        raise NotCallable("it imports modules")
    tree.body = [node for node in body if isinstance(node, _KEPT)]
    return compile(tree, "<reply>", "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)


def _is_ignored_import(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module in IGNORED_IMPORTS
    return isinstance(node, ast.Import) and all(alias.name in IGNORED_IMPORTS for alias in node.names)


def _builtins() -> Mapping[str, object]:
    return {name: member for name, member in vars(builtins).items() if name not in _WITHHELD}


def _outcome(function: Callable[..., object], arguments: str) -> str:
    args, keywords = ast.literal_eval(arguments)
    try:
        value = function(*args, **keywords)
    except MemoryError:
        raise
    except BaseException as error:  # foreign code
        return f"{RAISED}{ascii(type(error).__name__)[1:-1][:MAX_TEXT]}"
    return f"{RETURNED}{short_text(value)}"


def decode_outcomes(reply: Sequence[int], count: int, longest: int) -> tuple[str, list[str]]:
    """Return what is wrong with a function, and its `count` outcomes if nothing is. Raises BadFrame."""
    problem, at = decode_text(reply, 1, MAX_COMPLAINT_CHARS)
    outcomes, _ = decode_texts(reply, at, count, longest)
    if not problem and len(outcomes) != count:
        raise BadFrame(f"{len(outcomes)} outcomes of {count} calls")
    return problem, [printable(outcome) for outcome in outcomes]
