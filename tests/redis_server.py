"""A real Redis for the tests: from PATH, or as `make test` unpacks it from Debian's packages."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydantic import SecretStr
from redis.asyncio import Redis

from proxy.upstream.embedded import free_port

UNPACKED: Final = Path(sys.prefix) / "redis" / "usr"
LIBRARIES: Final = sorted({str(path.parent) for path in UNPACKED.glob("lib/**/libjemalloc.so*")})
PROGRAM: Final = shutil.which("redis-server", path=os.pathsep.join([str(UNPACKED / "bin"), os.environ.get("PATH", "")]))
MISSING: Final = "redis-server is not here; `make test` fetches it where there is apt"
PASSWORD: Final = "p@ss/word-of-redis"
QUOTED: Final = "p%40ss%2Fword-of-redis"
PATIENCE_S: Final = 30


class RedisServer:
    """A Redis without persistence on a port of its own, which can be killed, stopped and started again.

    Its settings, with the password, come over standard input.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> SecretStr:
        return SecretStr(f"redis://:{QUOTED}@127.0.0.1:{self.port}/0")

    def client(self) -> Redis:
        return Redis(host="127.0.0.1", port=self.port, password=PASSWORD, decode_responses=True)

    async def start(self) -> None:
        """Start it and wait until it accepts connections."""
        settings = f'bind 127.0.0.1\nport {self.port}\nsave ""\nappendonly no\nrequirepass {PASSWORD}\n'
        variables = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(LIBRARIES)}
        process = self._process = await asyncio.create_subprocess_exec(
            str(PROGRAM), "-", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=variables
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(settings.encode())
        process.stdin.close()
        async with asyncio.timeout(PATIENCE_S):
            while b"Ready to accept connections" not in (line := await process.stdout.readline()):
                assert line, "redis-server ended"

    async def kill(self) -> None:
        """End it with kill -9."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
