"""An installation of the project in a virtual environment of its own, used without the checkout."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from tests.faults.processes import URL

PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check")
IMPORTS: Final = """
import json, sys, time
begun = time.process_time()
import proxy.app
spent = time.process_time() - begun
import controllers, deploy, discovery, proxy.cli
origins = [package.__path__[0] for package in (controllers, deploy, discovery, proxy)]
print(json.dumps({"seconds": spent, "modules": sorted(sys.modules), "origins": origins}))
"""
SIZES: Final = """
import importlib.metadata, json, os
sizes = {}
for distribution in importlib.metadata.distributions():
    paths = [str(file.locate()) for file in distribution.files or () if file.suffix != ".pyc"]
    size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    sizes[f"{distribution.name} {distribution.version}"] = size
print(json.dumps(sizes))
"""


def run_command(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> str:
    """Run a command in a folder and return what it printed. Raises RuntimeError if it fails."""
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


class Installation:
    """A virtual environment with the project. Its commands run in a folder outside the checkout."""

    def __init__(self, folder: Path) -> None:
        self.environment = folder / "environment"
        self.folder = folder / "elsewhere"  # where commands run
        self.folder.mkdir(parents=True)
        venv.create(self.environment, symlinks=True)
        self.python = self.environment / "bin" / "python"
        (self.site,) = self.environment.glob("lib/python*/site-packages")

    def install(self, *requirements: str) -> None:
        """Install by pip."""
        command = [*PIP, "--python", str(self.python), "install", "--quiet", *requirements]
        run_command(command, self.folder, _variables())

    def borrow_dependencies(self) -> None:
        """Let the environment also import the packages of the one that runs this, but not its editable installation.

        That one is announced by a `.pth` file, which Python reads in an environment's own folder only.
        """
        (self.site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, *arguments: str, program: str = "autotts") -> str:
        """Run a program of the environment and return what it printed. Raises RuntimeError if it fails."""
        return run_command([str(self.environment / "bin" / program), *arguments], self.folder, _variables())

    def imports(self) -> dict[str, Any]:
        """Return the processor seconds of importing the server, the imported modules, and the packages' folders."""
        imported: dict[str, Any] = json.loads(self.run("-c", IMPORTS, program="python"))
        return imported

    def check(self) -> str:
        """Return what `pip check` says. Raises RuntimeError if requirements conflict."""
        return run_command([*PIP, "--python", str(self.python), "check"], self.folder, _variables()).strip()

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each installed distribution, without bytecode."""
        sizes: dict[str, int] = json.loads(self.run("-c", SIZES, program="python"))
        return sizes

    @asynccontextmanager
    async def serving(self, *arguments: str) -> AsyncIterator[str]:
        """Yield the URL of `autotts serve`."""
        process = await asyncio.create_subprocess_exec(
            str(self.environment / "bin" / "autotts"),
            *("serve", "--port", "0", "--store", str(self.folder / "autotts.db"), *arguments),
            cwd=self.folder,
            env=_variables(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdout is not None
        written = ""
        try:
            async for line in process.stdout:
                written += line.decode()
                if listening := URL.search(written):
                    break
            else:
                raise RuntimeError(f"autotts serve: {written}")
            yield listening[1]
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.communicate()


def _variables() -> dict[str, str]:
    """Return this environment without what would let a command find the checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("AUTOTTS_")}
