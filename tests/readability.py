"""Check readability rules: `python -m tests.readability [FOLDER ...]` lists the violations.

Each rule is a function that returns its violations as lines of text, so that callers can require that there are none.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("controllers", "discovery", "proxy", "deploy")
MAX_MODULES: Final = 15  # per folder, `__init__.py` not counted
MAX_LINES: Final = 400  # per file, unless its docstring says "Longer than 400 lines" and why
MAX_README_LINES: Final = 150
RIDDLES: Final = ("The same", "Those", "Of ", "As ", "What ")
"""Beginnings of docstrings that make no sense without the line above them."""
VAGUE: Final = frozenset({"one", "found", "told", "words", "said", "whole"})
"""Local names that do not describe their value. Comprehensions on one line may use them."""


def modules() -> Iterator[Path]:
    """Yield the path of every module of the product, relative to the project."""
    for package in PACKAGES:
        yield from sorted(path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))


def crowded_folders() -> list[str]:
    """Return the folders with more than MAX_MODULES modules."""
    counts = Counter(path.parent for path in modules() if path.name != "__init__.py")
    return [f"{folder}: {count} modules" for folder, count in counts.items() if count > MAX_MODULES]


def repeated_classes() -> list[str]:
    """Return the class names that are defined more than once; files that a search wrote all name theirs the same."""
    places = defaultdict(list)
    for path in modules():
        tree = _tree(path)
        if (ast.get_docstring(tree) or "").startswith("Found by search."):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    return [f"{', '.join(where)}: class {name}" for name, where in sorted(places.items()) if len(where) > 1]


def riddles() -> list[str]:
    """Return the docstrings whose first line depends on the line above it."""
    lines = []
    for path in modules():
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                text = node.value.value
                if isinstance(text, str) and text.startswith(RIDDLES):
                    lines.append(f"{path}:{node.lineno}: {text.splitlines()[0]}")
    return lines


def long_files() -> list[str]:
    """Return the files longer than MAX_LINES whose docstring gives no reason."""
    lines = []
    for path in modules():
        count = len((ROOT / path).read_text().splitlines())
        if count > MAX_LINES and "Longer than 400 lines" not in (ast.get_docstring(_tree(path)) or ""):
            lines.append(f"{path}: {count} lines")
    return lines


def long_readme() -> list[str]:
    """Return the length of README.md if it exceeds MAX_README_LINES."""
    count = len((ROOT / "README.md").read_text().splitlines())
    return [f"README.md: {count} lines"] if count > MAX_README_LINES else []


def vague_names() -> list[str]:
    """Return the local variables and parameters with a vague name. Fields of classes are not local."""
    lines = []
    for path in modules():
        tree = _tree(path)
        allowed = {id(name) for node in ast.walk(tree) for name in _allowed_targets(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.arg in VAGUE:
                lines.append(f"{path}:{node.lineno}: parameter {node.arg}")
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                is_vague = node.id in VAGUE and id(node) not in allowed
                lines += [f"{path}:{node.lineno}: {node.id}"] if is_vague else []
    return lines


def _allowed_targets(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the names that a comprehension on one line binds, and the fields that a class declares."""
    if isinstance(node, ast.comprehension) and node.target.end_lineno == node.iter.end_lineno:
        yield from ast.walk(node.target)
    if isinstance(node, ast.ClassDef):
        yield from (field.target for field in node.body if isinstance(field, ast.AnnAssign))


RULES: Final[Mapping[str, Callable[[], list[str]]]] = {
    "folders with too many modules": crowded_folders,
    "class names that occur more than once": repeated_classes,
    "docstrings that cannot be read alone": riddles,
    "long files without a reason": long_files,
    "a long README": long_readme,
    "vague local names": vague_names,
}


def _tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


if __name__ == "__main__":
    for rule, check in RULES.items():
        violations = [line for line in check() if not sys.argv[1:] or any(part in line for part in sys.argv[1:])]
        sys.stdout.write(f"{rule}: {len(violations)}\n" + "".join(f"  {line}\n" for line in violations))
