"""The compiled core: find the extension modules that `make compile` built, and use them if they fit the sources.

`setup.py` compiles the modules in `MODULES` with mypyc into the folder `extensions` beside this file, and writes a
manifest with the digest of the sources. Python's own import never looks into that folder. Importing this module, which
`controllers` does first, installs a finder if the manifest fits. After a change of a source the digest differs, and the
sources are interpreted as if nothing had been compiled.

Sandbox processes have this module loaded. It imports none that controllers could misuse and that are not loaded anyway.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

MODULES: Final = (
    "controllers.core.action_types",
    "controllers.core.branch_facts",
    "controllers.state",
    "controllers.sandbox.episode_rounds",
    "controllers.sandbox.frames",
    "discovery.evaluation.replay",
    "discovery.evaluation.traced_rounds",
)
"""Modules that are compiled."""
USED: Final = (
    *("controllers.actions", "controllers.environment", "controllers.errors", "controllers.limits"),
    *("controllers.signals", "controllers.voting"),
    *("discovery.data.recordings", "discovery.data.traces", "discovery.errors"),
)
"""Modules that they import. Compiled code contains their constants, so it fits only the same version of them."""
PURE: Final = "AUTOTTS_PURE_PYTHON"
"""Environment variable that turns the compiled core off, unless it is empty."""
ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = Path(__file__).with_name("extensions")
MANIFEST: Final = "manifest.txt"
"""File with the digest of the sources, and then the names of the modules, a line each."""
SUFFIX: Final = EXTENSION_SUFFIXES[0]
"""End of the names of extension modules, which names the Python version and the platform."""


class Core(NamedTuple):
    """Whether the core is compiled, and if not, why."""

    compiled: bool
    reason: str = ""

    def __str__(self) -> str:
        return "compiled" if self.compiled else f"pure Python: {self.reason}"


class ExtensionFinder:
    """Finds extension modules by their full names."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a compiled module; None for every other module."""
        file = self._files.get(fullname)
        if file is None:
            return None
        spec = ModuleSpec(fullname, ExtensionFileLoader(fullname, str(file)), origin=str(file))
        spec.has_location = True
        return spec


def source_path(module: str, root: Path = ROOT) -> Path:
    """Return the source of a module."""
    return root.joinpath(*module.split(".")).with_suffix(".py")


def source_digest(root: Path = ROOT) -> str:
    """Return a digest of everything that compiled modules are made of. Raises OSError if a source is missing."""
    digest = sha256(SUFFIX.encode())
    for module in (*MODULES, *USED):
        digest.update(f"\n{module}\n".encode() + source_path(module, root).read_bytes())
    return digest.hexdigest()


def write_manifest(folder: Path, modules: Sequence[str], root: Path = ROOT) -> None:
    """Write the manifest of compiled modules, whose files in `folder` have the modules' names and `SUFFIX`."""
    (folder / MANIFEST).write_text("\n".join((source_digest(root), *modules)) + "\n")


def find_extensions(folder: Path = FOLDER, root: Path = ROOT) -> dict[str, Path] | str:
    """Return the files of compiled modules by name, or why there are none that fit the sources."""
    if os.environ.get(PURE):
        return f"{PURE} is set"
    try:
        digest, *modules = (folder / MANIFEST).read_text().splitlines()
    except FileNotFoundError:
        return "nothing has been compiled; run `make compile`, or build a wheel where a C compiler is present"
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST} cannot be read: {error}; run `make compile`"
    try:
        if digest != source_digest(root):
            return "the sources have changed since they were compiled, or Python has; run `make compile`"
    except OSError as error:
        return f"a source is missing: {error}"
    files = {name: folder / f"{name}{SUFFIX}" for name in modules}
    missing = next((file for file in files.values() if not file.is_file()), None)
    return files if missing is None else f"{missing} is missing; run `make compile`"


def _install() -> Core:
    """Let Python import the compiled modules, if they fit."""
    files = find_extensions()
    if isinstance(files, str):
        return Core(False, files)
    early = next((name for name in MODULES if name in sys.modules), None)
    if early is not None:  # half of a core would use two kinds of actions
        return Core(False, f"{early} was imported before the package controllers")
    sys.meta_path.insert(0, ExtensionFinder(files))
    return Core(True)


CORE: Final = _install()
"""Which core this process uses."""
