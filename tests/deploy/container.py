"""Run the image's commands without a container engine: as uid 65534, without capabilities, with a read-only root.

`unshare` makes the namespaces and a shell mounts a root of its own. It holds the parts of this machine that the image
would bring (system libraries, Python and the installed packages), all read-only, and the project as the wheel that the
build context makes. Only /data and /tmp are writable. The network is the machine's, so that tests reach the proxy.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tests.deploy.dockerfile import Image

PROJECT: Final = Path("/opt/autotts")
"""Folder of the project in the container. In the image it is installed among Python's packages."""
SECRETS: Final = Path("/run/secrets")
NOBODY: Final = 65534
TOOLS: Final = ("unshare", "nsenter", "setpriv", "mount", "chroot")
DEVICES: Final = ("null", "zero", "random", "urandom")
SYSTEM: Final = ("/usr", "/bin", "/lib", "/lib64", "/etc")
NO_PRIVILEGES: Final = (
    *("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--no-new-privs"),
    *("--inh-caps=-all", "--bounding-set=-all"),
)


def lacking() -> str | None:
    """Return why containers cannot be made on this machine; None if they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"there is no {missing[0]}" if missing else f"{platform.system()} has no namespaces"
    if os.geteuid() != 0:
        return "only root may mount"
    probe = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "none", "/mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    return None if done.returncode == 0 else f"namespaces are not permitted: {done.stderr.strip()}"


class NotStarted(Exception):
    """The container has no process yet."""


class Container:
    """A running container. Process 1 is the command of the image itself."""

    def __init__(self, process: subprocess.Popen[str], environment: Sequence[str], folder: str, output: Path) -> None:
        self.process = process
        self._environment = environment
        self._folder = folder
        self._output = output

    @property
    def pid(self) -> int:
        """Process id of the container's process 1, seen from this machine. Raises NotStarted before there is one."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        if not children:
            raise NotStarted
        return int(children[0])

    def kill(self) -> None:
        """End every process of the container. Killing `unshare` is not enough: `setpriv` outlives it."""
        with suppress(NotStarted, FileNotFoundError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def passes(self, check: Sequence[str]) -> bool:
        """Return whether a health check passes. It fails while the container is being made."""
        try:
            return self.run(*check).returncode == 0
        except (NotStarted, FileNotFoundError):
            return False

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as the runtime runs the health check."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", f"--root=/proc/{self.pid}/root"]
        inside = [*NO_PRIVILEGES, *self._environment, "sh", "-c", f'cd {self._folder}; exec "$@"', "sh", *command]
        return subprocess.run([*enter, *inside], capture_output=True, text=True, timeout=60, check=False)

    @property
    def output(self) -> str:
        """Everything the container has printed."""
        return self._output.read_text(errors="replace")

    def status(self) -> dict[str, str]:
        """Return /proc/1/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@contextmanager
def started(
    image: Image,
    project: Path,
    workshop: Path,
    settings: Mapping[str, str],
    secrets: Path,
    arguments: Sequence[str] = (),
) -> Iterator[Container]:
    """Start the image's entrypoint with its command, or with `arguments`, and kill it at the end.

    `settings` are environment variables besides the image's own. The files in `secrets` appear below SECRETS.
    """
    root, data = workshop / "root", workshop / "data"
    root.mkdir()
    data.mkdir()
    os.chown(data, NOBODY, NOBODY)
    path = os.pathsep.join([str(Path(sys.prefix).resolve() / "bin"), "/usr/bin", "/bin"])
    variables = {"PATH": path, "PYTHONPATH": str(PROJECT), **image.env, **settings}
    environment = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
    command = [*image.entrypoint, *(arguments or image.command)]
    inside = [*NO_PRIVILEGES, *environment, "sh", "-c", f'cd {image.folder}; exec "$@"', "sh", *command]
    script = "\n".join([*_mounts(root, data, project, secrets), f"exec chroot {root} {shlex.join(inside)}"])
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", script]
    with (workshop / "output").open("w") as output:
        process = subprocess.Popen(unshare, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True)
    container = Container(process, environment, image.folder, workshop / "output")
    try:
        yield container
    finally:
        container.kill()


def _mounts(root: Path, data: Path, project: Path, secrets: Path) -> Iterator[str]:
    """Yield shell commands that build the root. They run in the container's own mount namespace."""
    yield "mount --make-rprivate /"
    yield f"mount -t tmpfs -o mode=755 none {root}"
    packages, python = Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()
    for source in (*map(Path, SYSTEM), packages, python):
        if source.is_symlink():
            yield f"ln -s {os.readlink(source)} {root}{source}"
        elif source.exists() and not (root / "usr").is_relative_to(source) and not _is_system(source):
            yield from _bind(source, root, source)
    yield from _bind(project, root, PROJECT)
    yield from _bind(secrets, root, SECRETS)
    yield f"mkdir -p {root}/proc {root}/tmp {root}/data {root}/dev"
    yield f"mount -t proc none {root}/proc"
    yield f"mount -t tmpfs -o mode=1777,noexec,nosuid,nodev none {root}/tmp"
    yield f"mount --bind {data} {root}/data"
    yield f"mount -t tmpfs -o mode=755 none {root}/dev"
    for device in DEVICES:
        yield f"touch {root}/dev/{device}; mount --bind /dev/{device} {root}/dev/{device}"
    yield f"mkdir -m 1777 {root}/dev/shm; mount -t tmpfs -o mode=1777 none {root}/dev/shm"
    yield f"mount -o remount,bind,ro {root}/dev"
    yield f"mount -o remount,bind,ro {root}"


def _is_system(source: Path) -> bool:
    """Return whether a folder of Python is below one of the system's, and so is mounted with it."""
    return any(source.is_relative_to(folder) and str(source) != folder for folder in SYSTEM)


def _bind(source: Path, root: Path, target: Path) -> Iterator[str]:
    yield f"mkdir -p {root}{target}"
    yield f"mount --bind {source} {root}{target}; mount -o remount,bind,ro {root}{target}"
