"""Static checks of controller files, with messages for their authors.

They are advice, not a security boundary: the sandbox enforces what a file may do (`controllers/sandbox/`).
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from typing import Final

from controllers.signals import NO_SIGNALS, Signal, parse_signals

IMPORTS: Final = (
    *("controllers", "math", "statistics", "collections", "itertools", "dataclasses", "typing", "heapq", "bisect"),
    *("functools", "__future__"),
)
"""Modules a controller may import, with their submodules."""
CHANCE: Final = frozenset({"random", "secrets", "uuid"})
CLOCKS: Final = frozenset({"time", "datetime", "sched", "timeit"})
BUILTINS: Final = {
    **dict.fromkeys(("eval", "exec", "compile"), "a controller must be complete in its file"),
    **dict.fromkeys(("open", "input", "print", "breakpoint"), "a controller must not read or write anything"),
    **dict.fromkeys(("globals", "locals", "vars"), "use names directly"),
    **dict.fromkeys(("id", "hash"), "it differs between runs, and decisions must not"),
}
DEFINED: Final = frozenset({"__init__", "__post_init__", "__slots__", "__name__", "__doc__", "__all__"})
"""Double-underscore names that a controller may use."""
MOST: Final = 20
"""Most findings that are reported for one file."""
LONGEST: Final = 500
"""Characters of one finding."""
PROBE_NAMES: Final = frozenset({"probe", "PROBE", "*"})
"""Names by which a file may refer to the action that probes a branch, and the import of all names."""
SIGNALS: Final = "signals"
"""Class attribute in which a controller declares the signals that it reads."""
STATELESS: Final = "one object serves one episode; keep state in self"


def advise(source: str) -> list[str]:
    """Return the problems of a file, one line each, in the order of the file.

    It takes time proportional to the text, and never raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes are harmless
            tree = ast.parse(source)
        problems = sorted(dict.fromkeys([*_everywhere(tree), *_classes(tree)]))
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError) as error:  # SystemError: deep nesting
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        kind = SyntaxError if type(error) is ValueError else type(error)  # for a NUL, before Python 3.11.4
        return [f"{line}{kind.__name__}: {getattr(error, 'msg', None) or error}"]
    lines = [f"line {line}: {problem}" for line, problem in problems]
    more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return [line if len(line) <= LONGEST else f"{line[:LONGEST]} …" for line in lines[:MOST]] + more


def declared_signals(source: str) -> frozenset[Signal]:
    """Return the signals that a file's controller declares; none if the file or its declaration is invalid."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        deciding = [classes[name] for name in _with_method("decide", classes)]
        declaration = _declaration(deciding[0], classes) if len(deciding) == 1 else None
        return NO_SIGNALS if declaration is None else parse_signals(_literal_names(declaration))
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return NO_SIGNALS


def uses_probes(source: str) -> bool:
    """Return whether a file's controller may probe: it refers to probes. True for a file that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return True
    names = (getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None) for node in nodes)
    return any(name in PROBE_NAMES for name in names)


def _everywhere(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and message of problems that may occur anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            yield from _import(node.lineno, "." * node.level + (node.module or ""))
        elif isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}: {STATELESS}"
        elif isinstance(node, ast.Attribute) and _is_dunder(node.attr):
            yield node.lineno, f".{node.attr}: a controller must not use Python internals"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            yield node.lineno, f"{node.func.id}(): {BUILTINS[node.func.id]}"
        elif isinstance(node, ast.Name) and _is_dunder(node.id):
            yield node.lineno, f"{node.id}: a controller must not use Python internals"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_dunder(node.value):
            yield node.lineno, f"{node.value!r}: a controller must not use Python internals"
        elif isinstance(node, ast.AsyncFunctionDef | ast.Await):
            yield node.lineno, "async: a decision must not wait"


def _import(line: int, module: str) -> Iterator[tuple[int, str]]:
    top = module.partition(".")[0]
    if top in IMPORTS:
        return
    if top in CHANCE:
        reason = "no randomness: decisions must depend on the states only, so that replay is valid"
    elif top in CLOCKS:
        reason = "no clock: decisions must depend on the states only, so that replay is valid"
    else:
        reason = f"a controller may import {', '.join(IMPORTS[:-1])}"
    yield line, f"import {module or '.'}: {reason}"


def _is_dunder(name: str) -> bool:
    return len(name) > 4 and name.startswith("__") and name.endswith("__") and name not in DEFINED


def _classes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and message of problems with the controller class, or that there is not exactly one."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    deciding = _with_method("decide", classes)
    candidates = [node for node in classes.values() if node.name in deciding]
    if len(candidates) != 1:
        names = ", ".join(sorted(node.name for node in candidates)) or "none"
        line = candidates[1].lineno if candidates else 1
        yield line, f"a controller file must have exactly one class with a decide method, not {names}"
        return
    (controller,) = candidates
    decide, init = (_method(controller, name, classes) for name in ("decide", "__init__"))
    if decide is not None and _parameters(decide) != 2:
        yield decide.lineno, "decide must take self and the state only"
    declaration = _declaration(controller, classes)
    if declaration is not None:
        try:
            parse_signals(_literal_names(declaration))
        except ValueError as error:
            yield declaration.lineno, f"{SIGNALS}: {error}"
    takes = _fields(controller) if init is None else _parameters(init) - 1
    if takes != 1:
        line = (init or controller).lineno
        yield line, f"{controller.name} must take β only: __init__(self, beta)"


def _declaration(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> ast.expr | None:
    """Return the value of a class's `signals` attribute, its own or inherited from a class of this file."""
    seen, left = {node.name}, [node]
    while left:
        node = left.pop()
        for statement in reversed(node.body):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            value = getattr(statement, "value", None)
            if any(isinstance(target, ast.Name) and target.id == SIGNALS for target in targets) and value is not None:
                return value  # type: ignore[no-any-return]
        for base in reversed(_bases(node, classes)):
            if base.name not in seen:
                seen.add(base.name)
                left.append(base)
    return None


def _literal_names(value: ast.expr) -> list[object]:
    """Return the items of a literal tuple, list or set. Raises ValueError for any other expression."""
    if not isinstance(value, ast.Tuple | ast.List | ast.Set):
        raise ValueError(f'declare them as a literal tuple such as ("{Signal.INTERVALS}",)')
    return [item.value if isinstance(item, ast.Constant) else ast.unparse(item)[:40] for item in value.elts]


def _with_method(name: str, classes: Mapping[str, ast.ClassDef]) -> set[str]:
    """Return the classes that define a method, or inherit it from a class of this file."""
    derived: dict[str, list[str]] = {}
    for node in classes.values():
        for base in _bases(node, classes):
            derived.setdefault(base.name, []).append(node.name)
    with_method = {node.name for node in classes.values() if _own_method(node, name) is not None}
    new = list(with_method)
    while new:
        for child in derived.get(new.pop(), ()):
            if child not in with_method:
                with_method.add(child)
                new.append(child)
    return with_method


def _method(node: ast.ClassDef, name: str, classes: Mapping[str, ast.ClassDef]) -> ast.FunctionDef | None:
    """Return a method of a class, or the one it inherits from a class of this file; each class is visited once."""
    seen, left = {node.name}, [node]
    while left:
        node = left.pop()
        if (own := _own_method(node, name)) is not None:
            return own
        for base in reversed(_bases(node, classes)):
            if base.name not in seen:
                seen.add(base.name)
                left.append(base)
    return None


def _own_method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == name), None)


def _bases(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """Return the base classes of a class that are defined in this file."""
    names = (base.id for base in node.bases if isinstance(base, ast.Name))
    return [classes[name] for name in names if name in classes and name != node.name]


def _parameters(function: ast.FunctionDef) -> int:
    """Return the number of parameters, including self and those with defaults; -1 for `*` and keyword-only ones."""
    arguments = function.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs:
        return -1
    return len(arguments.posonlyargs) + len(arguments.args)


def _fields(node: ast.ClassDef) -> int:
    """Return the number of constructor arguments of a dataclass; 0 for another class."""
    if not any(_mentions(decorator, "dataclass") for decorator in node.decorator_list):
        return 0
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and not _mentions(one.annotation, "ClassVar")]
    return sum(one.value is None or not _is_init_false(one.value) for one in fields)


def _mentions(tree: ast.AST, word: str) -> bool:
    """Return whether a name, attribute or string contains `word`. `ast.unparse` could recurse too deeply for this."""
    for node in ast.walk(tree):
        text = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
        if isinstance(text, str) and word in text:
            return True
    return False


def _is_init_false(tree: ast.AST) -> bool:
    """Return whether a call has the argument `init=False`."""
    return any(
        isinstance(node, ast.keyword)
        and node.arg == "init"
        and isinstance(node.value, ast.Constant)
        and node.value.value is False
        for node in ast.walk(tree)
    )
