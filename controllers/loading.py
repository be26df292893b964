"""Controllers by name or from a file, as something another process can make them from.

A file is checked by reading it (`controllers/advice.py`) and not run: `Spec.factory` of a file's controller runs its
source with all the rights of whoever asks for it. Sealed children ask, and others on an operator's word only.
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
from typing import Final

from controllers.advice import advise
from controllers.builtin import find
from controllers.episode import Controller, Factory
from controllers.errors import BadController, ControllersError, UnknownController

LARGEST: Final = 64 * 1024
"""Bytes a controller file may have."""
DISCOVERED: Final = Path(__file__).parent / "discovered"


@dataclass(frozen=True)
class Spec:
    """Which controller is meant, and everything another process needs to make it."""

    name: str  # a registered name such as cmc or asc@64, or the stem of a file
    source: str | None = None  # the file's text; None for a registered one

    @property
    def is_foreign(self) -> bool:
        """Whether it came from a file."""
        return self.source is not None

    @property
    def chains(self) -> int:
        """How many chains `NAME@N` asks for; 0 where the number follows β."""
        _, _, number = self.name.partition("@")
        return int(number) if self.source is None and number else 0

    @property
    def digest(self) -> str:
        """A hash of the controller: of its text, or of its name if it is a registered one."""
        return sha256((self.name if self.source is None else self.source).encode()).hexdigest()

    @cached_property
    def factory(self) -> Factory:
        """What makes a fresh controller from β; runs a file's source. Raises UnknownController or BadController."""
        return find(self.name) if self.source is None else load(self.source, self.name)


def parse_spec(text: str) -> Spec:
    """`NAME`, `NAME@N` or `FILE.py` as a spec; names of discovered controllers too.

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
    """Names of the controllers in `controllers/discovered`."""
    return sorted(path.stem for path in DISCOVERED.glob("*.py") if path.stem != "__init__")


def read_source(path: Path) -> str:
    """Return the text of a controller file. Raises BadController, naming the file and what is wrong.

    It is opened once and without waiting, so that no pipe, no device and no change of its name can hold this up.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadController(f"{path}: not a regular file; name a file with a controller's text")
            source = file.read(LARGEST + 1)
        if len(source) > LARGEST:
            raise BadController(f"{path}: more than {LARGEST} bytes; a controller file has no more")
        return source.decode()
    except OSError as error:
        raise BadController(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # no UTF-8, or a path with a NUL
        raise BadController(f"{path}: {error}; a controller file is UTF-8 text") from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | os.O_CLOEXEC)


def read(path: Path) -> Spec:
    """The controller in a file, which is not run. Raises BadController, naming the file and all that is wrong."""
    text = read_source(path)
    if wrong := advise(text):
        raise BadController(f"{path}: {'; '.join(wrong)}")
    return Spec(path.stem, text)


def load(source: str, name: str) -> Factory:
    """The one class with a `decide` that a controller file's text defines, by running it. Raises BadController."""
    module = ModuleType(f"controller_{sha256(source.encode()).hexdigest()[:12]}")
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # foreign code: whatever it raises is its failure, not ours
        raise BadController(f"{name}.py: {type(error).__name__}: {error}") from None
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and callable(getattr(value, "decide", None))
    ]
    if len(found) != 1:
        names = ", ".join(sorted(value.__name__ for value in found)) or "none"
        raise BadController(f"{name}.py: a controller file has one class with a decide method, not {names}")
    made: type[Controller] = found[0]
    return made


def make(spec: Spec, beta: float) -> Controller:
    """A fresh controller for one episode. Raises BetaError, or BadController on whatever its constructor raises."""
    try:
        return spec.factory(beta)
    except ControllersError:
        raise
    except (Exception, SystemExit) as error:
        raise BadController(f"{spec.name}: its constructor raised {type(error).__name__}: {error}") from None
