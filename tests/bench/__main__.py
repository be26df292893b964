"""Run every bench on the embedded model and print one table."""

from __future__ import annotations

import asyncio
import os
import platform
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from proxy.embedded import EmbeddedServer
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.bench import answers, cascade, edge, live, recorder, replay, sealed


def machine() -> str:
    """The processor, its cores and the Python that ran this."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


async def main() -> None:
    offline = [
        *answers.rows(),
        *[row async for row in answers.mixed()],
        *replay.rows(),
        *sealed.rows(),
        *cascade.rows(),
        *await recorder.rows(),
        *await edge.rows(),
    ]
    async with EmbeddedServer() as server:
        settings = load(upstream=server.url, **{**EMBEDDED, "interval": live.INTERVAL})
        async with running(settings) as url, aiohttp.ClientSession() as http:
            rows = await live.rows(server.url, url, http)
    table = Table(title=machine(), title_justify="left")
    for heading in ("bench", "measured", "beside", "ratio"):
        table.add_column(heading)
    for row in [*offline, *rows]:
        table.add_row(*row)
    Console(width=150).print(table)


asyncio.run(main())
