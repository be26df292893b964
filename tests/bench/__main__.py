"""Run every bench, or those that are named, and print one table; with --peers a second one, of other people's proxies.

python -m tests.bench [--peers] [PART ...]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from proxy.embedded import EmbeddedServer
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.bench import answers, cascade, edge, live, recorder, replay, sealed
from tests.bench.peers import PEERS


def machine() -> str:
    """The processor, its cores and the Python that ran this."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


async def live_rows() -> list[live.Row]:
    """What runs on the embedded model."""
    async with EmbeddedServer() as server:
        settings = load(upstream=server.url, **{**EMBEDDED, "interval": live.INTERVAL})
        async with running(settings) as url, aiohttp.ClientSession() as http:
            return await live.rows(server.url, url, http)


async def main(parts: Sequence[str], with_peers: bool) -> None:
    rows: list[tuple[str, ...]] = []
    if "answers" in parts:
        rows += answers.rows()
        rows += [row async for row in answers.mixed()]
    if "replay" in parts:
        rows += replay.rows()
    if "sealed" in parts:
        rows += sealed.rows()
    if "cascade" in parts:
        rows += cascade.rows()
    if "recorder" in parts:
        rows += await recorder.rows()
    if "edge" in parts:
        taken = await edge.measured(PEERS if with_peers else ())
        rows += edge.rows(taken)
    if "live" in parts:
        rows += await live_rows()
    console = Console(width=150)
    console.print(_table(machine(), ("bench", "measured", "beside", "ratio"), rows))
    if "edge" in parts and with_peers:
        beside = _table("Pass-throughs to a backend that does nothing", edge.HEADINGS, edge.side_by_side(taken))
        beside.caption, beside.caption_justify = edge.CAPTION, "left"
        console.print(beside)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table


PARTS = ("answers", "replay", "sealed", "cascade", "recorder", "edge", "live")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}")
    asyncio.run(main(asked.parts or PARTS, asked.peers))
