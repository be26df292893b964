"""Specs of controllers, by name or from a file. Another process can create the controller from its spec.

A file is checked (`controllers/advice.py`) but not run. `Spec.factory` runs the source of a file with all rights of the
calling process: sandbox processes call it, and other processes only if the operator allows it.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from controllers.advice import advise, declared_signals, uses_probes
from controllers.builtin import find
from controllers.episode import Controller, Factory
from controllers.errors import BadController, ControllersError, UnknownController
from controllers.signals import Signal, parse_signals

LARGEST: Final = 64 * 1024
"""Most bytes of a controller file."""
DISCOVERED: Final = Path(__file__).parent / "discovered"


@dataclass(frozen=True)
class Spec:
    """The name of a controller, and all that another process needs to create it."""

    name: str  # a built-in name such as cmc or asc@64, or the stem of a file
    source: str | None = None  # text of the file; None for a built-in controller

    @property
    def is_foreign(self) -> bool:
        """Whether the controller came from a file."""
        return self.source is not None

    @property
    def chains(self) -> int:
        """N of `NAME@N`; 0 where the number of chains follows β."""
        _, _, number = self.name.partition("@")
        return int(number) if self.source is None and number else 0

    @property
    def digest(self) -> str:
        """Hash of the text of a file, or of the name of a built-in controller."""
        return sha256((self.name if self.source is None else self.source).encode()).hexdigest()

    @cached_property
    def signals(self) -> frozenset[Signal]:
        """The signals that its controller declares. A file is read, not run; an invalid declaration counts as none."""
        if self.source is not None:
            return declared_signals(self.source)
        factory: Any = find(self.name)
        return parse_signals(getattr(getattr(factory, "func", factory), "signals", ()))

    @cached_property
    def needs_probes(self) -> bool:
        """Whether its controller may probe, so that it cannot decide episodes without probes."""
        if self.source is not None:
            return uses_probes(self.source)
        factory: Any = find(self.name)
        return bool(getattr(getattr(factory, "func", factory), "needs_probes", False))

    @cached_property
    def factory(self) -> Factory:
        """Creates a controller from β. A file's source is run. Raises UnknownController or BadController."""
        return find(self.name) if self.source is None else load(self.source, self.name)


def parse_spec(text: str) -> Spec:
    """Return the spec of `NAME`, `NAME@N` or `FILE.py`. Names of discovered controllers are accepted too.

    Raises UnknownController or BadController.
    """
    if text.endswith(".py"):
        return read(Path(text))
    if text in discovered():
        return read(DISCOVERED / f"{text}.py")
    try:
        find(text)
    except UnknownController as error:
        raise UnknownController(", ".join([str(error), *discovered()])) from None
    return Spec(text)


def discovered() -> list[str]:
    """Return the names of the controllers in `controllers/discovered`."""
    return sorted(path.stem for path in DISCOVERED.glob("*.py") if path.stem != "__init__")


def read_source(path: Path) -> str:
    """Return the text of a controller file. Raises BadController, naming the file and what is wrong.

    The file is opened once and without blocking, so that pipes, devices and renames cannot delay it.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadController(f"{path}: not a regular file; name a file that contains a controller")
            source = file.read(LARGEST + 1)
        if len(source) > LARGEST:
            raise BadController(f"{path}: larger than {LARGEST} bytes, the limit of a controller file")
        return source.decode()
    except OSError as error:
        raise BadController(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # no UTF-8, or a path with a NUL
        raise BadController(f"{path}: {error}; a controller file must be UTF-8 text") from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | os.O_CLOEXEC)


def read(path: Path) -> Spec:
    """Return the spec of a controller file without running it. Raises BadController, which lists all problems."""
    text = read_source(path)
    if wrong := advise(text):
        raise BadController(f"{path}: {'; '.join(wrong)}")
    return Spec(path.stem, text)


def load(source: str, name: str) -> Factory:
    """Run the text of a controller file and return its class with a `decide` method. Raises BadController."""
    module = ModuleType(_module_name(sha256(source.encode()).hexdigest()))
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # foreign code: any error is its own
        raise BadController(f"{name}.py: {type(error).__name__}: {error}") from None
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and callable(getattr(value, "decide", None))
    ]
    if len(classes) != 1:
        names = ", ".join(sorted(value.__name__ for value in classes)) or "none"
        raise BadController(
            f"{name}.py: a controller file must have exactly one class with a decide method, not {names}"
        )
    made: type[Controller] = classes[0]
    return made


def make(spec: Spec, beta: float) -> Controller:
    """Create a controller for one episode. Raises BetaError, or BadController if its constructor raises."""
    try:
        return spec.factory(beta)
    except ControllersError:
        raise
    except (Exception, SystemExit) as error:
        raise BadController(f"{spec.name}: its constructor raised {type(error).__name__}: {error}") from None


def unload(digest: str) -> None:
    """Remove the module of a controller file that `load` has run, by the file's digest. Its class still works."""
    sys.modules.pop(_module_name(digest), None)


def _module_name(digest: str) -> str:
    return f"controller_{digest[:12]}"
