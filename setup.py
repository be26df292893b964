"""Compile the core with mypyc (`controllers/core/compiled.py`): `make compile` in a checkout, and in wheels.

Wheels are compiled if a C compiler and mypyc are present, and are pure Python otherwise, or if AUTOTTS_PURE_PYTHON is
set. Editable installations are never compiled, so that nothing is built that would have to be built again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
LIBRARY = "autotts_core"
"""Name of the library that all compiled modules share."""


def _loader():
    """Return the module `controllers.core.compiled`, without importing the packages around it."""
    spec = importlib.util.spec_from_file_location("compiled", ROOT / "controllers" / "core" / "compiled.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> str | None:
    """Return the path of the C compiler that extension modules are built with; None if there is none."""
    named = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    return shutil.which(named[0]) if named else None


def lacking() -> str:
    """Return what is missing to compile; empty if nothing is."""
    if importlib.util.find_spec("mypyc") is None:
        return "mypyc is missing: pip install mypy"
    if compiler() is None:
        return "there is no C compiler: install gcc or clang, or name one in CC"
    return ""


def compile_core(target: Path) -> None:
    """Compile the core into the folder `target`, replacing what is there."""
    from mypyc.build import mypycify

    loader = _loader()
    with tempfile.TemporaryDirectory(prefix="autotts-compile-") as name:
        folder = Path(name)
        options = [
            "--config-file=",
            "--follow-imports=silent",
            "--ignore-missing-imports",
            f"--cache-dir={folder}/m",
        ]
        sources = [loader.source_path(module, Path()).as_posix() for module in loader.MODULES]
        extensions = mypycify(
            [*options, *sources], opt_level="3", debug_level="0", target_dir=f"{folder}/c", group_name=LIBRARY
        )
        distribution = Distribution({"name": LIBRARY, "ext_modules": extensions})
        build = distribution.get_command_obj("build_ext")
        build.build_lib, build.build_temp = f"{folder}/lib", f"{folder}/objects"
        build.ensure_finalized()
        build.run()
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        names = [extension.name for extension in extensions]
        for extension in names:
            shutil.copy2(build.get_ext_fullpath(extension), target / f"{extension}{loader.SUFFIX}")
        loader.write_manifest(target, names)


class CompileCore(Command):
    """`python setup.py compile_core`: compile the core in this checkout."""

    description = "compile the core of the evaluator in this checkout"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """There are no options."""

    def finalize_options(self) -> None:
        """There are no options."""

    def run(self) -> None:
        """Compile, or say what is missing."""
        if problem := lacking():
            raise SystemExit(f"the core cannot be compiled: {problem}")
        compile_core(_loader().FOLDER)


class BuildPython(build_py):
    """Copies the modules into a wheel and compiles the core there."""

    def run(self) -> None:
        """Build, and compile if this is a wheel that is compiled."""
        super().run()
        target = Path(self.build_lib, "controllers", "core", "extensions")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        if COMPILES and not self.editable_mode:
            compile_core(target)


class CoreDistribution(Distribution):
    """A distribution whose wheel depends on the platform if the core is compiled."""

    def has_ext_modules(self) -> bool:
        """Return whether the wheel contains compiled modules."""
        return COMPILES


COMPILES = "bdist_wheel" in sys.argv and not os.environ.get("AUTOTTS_PURE_PYTHON") and not lacking()

if __name__ == "__main__":
    os.chdir(ROOT)
    setup(cmdclass={"build_py": BuildPython, "compile_core": CompileCore}, distclass=CoreDistribution)
