"""Run every bench, or the named parts, print one table and write it to `tests/bench/report.md`.

    python -m tests.bench [--quick] [--peers] [PART ...]

`--quick` runs every part once, as small as it can be: it shows that the bench works, and its figures mean nothing.
`--peers` also measures other proxies. Parts run one after the other, each with an event loop of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Final

import aiohttp
from rich.console import Console
from rich.table import Table

from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.upstream.embedded import EmbeddedServer
from tests.bench import answers, cascade, edge, live, recorder, replay, sealed
from tests.bench.peers import PEERS
from tests.bench.rows import Row, Size

REPORT: Final = Path(__file__).with_name("report.md")
HEADINGS: Final = ("bench", "measured", "beside", "ratio", "spread")
Beside = tuple[str, ...]
"""A line of the table of peers."""


def machine() -> str:
    """Return the processor, its cores and the Python that runs this."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


async def _answer_rows(size: Size) -> list[Row]:
    return [*answers.rows(size), answers.vouched(), *[row async for row in answers.mixed(size)]]


async def _live_rows(size: Size) -> list[Row]:
    async with EmbeddedServer() as server:
        settings = load(upstream=server.url, **{**EMBEDDED, "interval": live.INTERVAL})
        async with running(settings) as url, aiohttp.ClientSession() as http:
            return await live.rows(server.url, url, http, size)


def _edge_rows(size: Size) -> list[Row]:
    return edge.rows(asyncio.run(edge.measured(size)))


PARTS: Final[Mapping[str, Callable[[Size], Iterable[Row]]]] = {
    "answers": lambda size: asyncio.run(_answer_rows(size)),
    "replay": replay.rows,
    "sealed": sealed.rows,
    "cascade": cascade.rows,
    "recorder": lambda size: asyncio.run(recorder.rows(size)),
    "edge": _edge_rows,
    "live": lambda size: asyncio.run(_live_rows(size)),
}


def run(parts: Sequence[str], size: Size, *, with_peers: bool = False) -> None:
    """Run `parts`, print their rows, and write the report unless the run is quick."""
    rows: list[Row] = []
    skipped: list[str] = []
    peers: list[Beside] = []
    began = time.monotonic()
    for part in parts:
        started = time.monotonic()
        if part == "edge" and with_peers:
            taken = asyncio.run(edge.measured(size, PEERS))
            found = edge.rows(taken)
            peers = edge.side_by_side(taken)
        else:
            found = list(PARTS[part](size))
        rows += found
        if not found:
            skipped.append(part)
        sys.stderr.write(f"{part}: {len(found)} rows in {time.monotonic() - started:.0f} s\n")
    minutes = (time.monotonic() - began) / 60
    console = Console(width=180)
    console.print(_table(machine(), HEADINGS, rows))
    if peers:
        console.print(_table("Pass-throughs to a backend that does nothing", edge.HEADINGS, peers))
        console.print(edge.CAPTION)
    if skipped:
        console.print(f"not measured, for the public recordings are not beside the project: {', '.join(skipped)}")
    console.print(f"{len(rows)} rows of {', '.join(parts)} in {minutes:.1f} minutes")
    if not size.is_quick:
        REPORT.write_text(_report(parts, rows, peers, skipped, minutes), "utf-8")
        console.print(f"written to {REPORT}")


def _report(
    parts: Sequence[str], rows: Sequence[Row], peers: Sequence[Beside], skipped: Sequence[str], minutes: float
) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Bench report",
        "",
        f"Written by `make bench` on {date.today().isoformat()}: {machine()}.",
        f"Parts: {', '.join(parts)}, in {minutes:.0f} minutes.",
        "Figures are medians. Ratios compare two things measured by turns in one run. The spread is the lowest and the",
        "highest ratio, or the lowest and the highest figure.",
        "",
        *_markdown(HEADINGS, rows),
    ]
    if peers:
        lines += ["", "## Peers", "", *_markdown(edge.HEADINGS, peers), "", edge.CAPTION]
    if skipped:
        lines += ["", f"Not measured, for the public recordings are not beside the project: {', '.join(skipped)}."]
    return "\n".join(lines) + "\n"


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--quick", action="store_true", help="run every part once, as small as it can be")
    parser.add_argument("--peers", action="store_true", help="also measure other proxies")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    run(options.parts or list(PARTS), Size(options.quick), with_peers=options.peers)
