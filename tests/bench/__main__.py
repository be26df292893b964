"""Run all benchmarks, or the named parts; print a table and write it to `build/bench.md`.

    python -m tests.bench [--quick] [--peers] [--upstream URL] [--json FILE] [--plots FOLDER] [--episodes N]
                          [PART ...]

`--quick` runs every part once at its smallest size. It shows that the benchmarks work; its figures mean nothing.
`--upstream` is a vLLM with the embedded model that runs already; without it, each part that needs one starts one.
`--peers` also measures other proxies. `--json` writes the rows to a file instead of the report. `growth` also draws a
picture, into `build` or the folder of `--plots`, and `--episodes` adds a size of its store. Parts run one after the
other, each in its own event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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

from controllers.core.compiled import CORE
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.bench import (
    answers,
    busy,
    cascade,
    collect,
    dashboard,
    default,
    edge,
    growth,
    live,
    own,
    ray_sweep,
    recorder,
    replay,
    rivals,
    sealed,
    signals,
)
from tests.bench.peers import PEERS
from tests.bench.rows import Row, Size

REPORT: Final = Path(__file__).parents[2] / "build" / "bench.md"
HEADINGS: Final = ("benchmark", "measured", "compared with", "ratio", "spread")
PeerRow = tuple[str, ...]
"""Row of the table that compares proxies."""


def machine() -> str:
    """Return the processor, its number of cores, the Python version, and whether the evaluator's core is compiled."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    core = "compiled" if CORE.compiled else "pure Python"
    version = f"Python {platform.python_version()}, evaluator {core}"
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {version}"


async def _answer_rows(size: Size) -> list[Row]:
    return [*answers.rows(size), answers.votability(), *[row async for row in answers.mixed(size)]]


async def _live_rows(size: Size) -> list[Row]:
    async with live.embedded_model(size) as upstream:
        settings = load(upstream=upstream, **{**EMBEDDED, "interval": live.INTERVAL})
        async with running(settings) as url, aiohttp.ClientSession() as http:
            return await live.rows(upstream, url, http, size)


async def _signal_rows(size: Size) -> list[Row]:
    async with live.embedded_model(size) as upstream, aiohttp.ClientSession() as http:
        return await signals.rows(upstream, http, size)


def _edge_rows(size: Size) -> list[Row]:
    return edge.rows(asyncio.run(edge.measured(size)))


PARTS: Final[Mapping[str, Callable[[Size], Iterable[Row]]]] = {
    "answers": lambda size: asyncio.run(_answer_rows(size)),
    "replay": replay.rows,
    "sealed": sealed.rows,
    "default": default.rows,
    "cascade": cascade.rows,
    "ray": ray_sweep.rows,
    "dashboard": dashboard.rows,
    "growth": lambda size: asyncio.run(growth.rows(size)),
    "recorder": lambda size: asyncio.run(recorder.rows(size)),
    "edge": _edge_rows,
    "own": lambda size: asyncio.run(own.rows(size)),
    "busy": lambda size: asyncio.run(busy.rows(size)),
    "live": lambda size: asyncio.run(_live_rows(size)),
    "collect": lambda size: asyncio.run(collect.rows(size)),
    "signals": lambda size: asyncio.run(_signal_rows(size)),
    "rivals": lambda size: asyncio.run(rivals.rows(size)),
}
BY_CORE: Final = frozenset({"replay", "sealed", "cascade"})
"""Parts that are faster with the compiled core. Their rows say so if it is used."""
COMPILED: Final = " (compiled core)"
WITH_PEERS: Final = frozenset({"rivals"})
"""Parts that run only if they are named, or with `--peers`."""


def usual_parts(*, with_peers: bool) -> list[str]:
    """Return the parts that run if none is named."""
    return [part for part in PARTS if with_peers or part not in WITH_PEERS]


def run(parts: Sequence[str], size: Size, *, with_peers: bool = False, json_to: Path | None = None) -> None:
    """Run `parts`, print their rows, and write them to `json_to` or to the report, unless the run is quick."""
    rows: list[Row] = []
    skipped: list[str] = []
    peers: list[PeerRow] = []
    began = time.monotonic()
    for part in parts:
        started = time.monotonic()
        if part == "edge" and with_peers:
            measured = asyncio.run(edge.measured(size, PEERS))
            part_rows = edge.rows(measured)
            peers = edge.peer_rows(measured)
        else:
            part_rows = list(PARTS[part](size))
        if part in BY_CORE and CORE.compiled:
            part_rows = [row._replace(bench=row.bench + COMPILED) for row in part_rows]
        rows += part_rows
        if not part_rows:
            skipped.append(part)
        sys.stderr.write(f"{part}: {len(part_rows)} rows in {time.monotonic() - started:.0f} s\n")
    minutes = (time.monotonic() - began) / 60
    console = Console(width=180)
    console.print(_table(machine(), HEADINGS, rows))
    if peers:
        console.print(_table("Forwarding to a backend that does no work", edge.HEADINGS, peers))
        console.print(edge.CAPTION)
    if skipped:
        console.print(f"not measured, because the public recordings are not in ../shared: {', '.join(skipped)}")
    console.print(f"{len(rows)} rows of {', '.join(parts)} in {minutes:.1f} minutes")
    if json_to is not None:
        json_to.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    elif not size.is_quick:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(_report(parts, rows, peers, skipped, minutes), "utf-8")
        console.print(f"written to {REPORT}")


def _report(
    parts: Sequence[str], rows: Sequence[Row], peers: Sequence[PeerRow], skipped: Sequence[str], minutes: float
) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Benchmark report",
        "",
        f"Written by `make bench` on {date.today().isoformat()}: {machine()}.",
        f"Parts: {', '.join(parts)}, in {minutes:.0f} minutes.",
        "Figures are medians. Each ratio compares two measurements that alternate within one run. The spread gives the",
        "lowest and the highest ratio, or the lowest and the highest figure.",
        "",
        markdown_table(HEADINGS, rows),
    ]
    if peers:
        lines += ["", "## Peers", "", markdown_table(edge.HEADINGS, peers), "", edge.CAPTION]
    if skipped:
        lines += ["", f"Not measured, because the public recordings are not in `../shared`: {', '.join(skipped)}."]
    return "\n".join(lines) + "\n"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]
    return "\n".join(lines)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--quick", action="store_true", help="run every part once at its smallest size")
    parser.add_argument("--peers", action="store_true", help="also measure other proxies")
    parser.add_argument("--upstream", default="", metavar="URL", help="a vLLM that serves the embedded model")
    parser.add_argument("--plots", type=Path, default=Size().plots, metavar="FOLDER", help="folder for pictures")
    parser.add_argument(
        "--episodes", type=int, default=0, metavar="N", help="also measure a store with so many, such as 1000000"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, not to the report")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"part to run: {', '.join(PARTS)} (default: all but rivals)"
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    run(
        options.parts or usual_parts(with_peers=options.peers),
        Size(options.quick, options.upstream, options.plots, options.episodes),
        with_peers=options.peers,
        json_to=options.json,
    )
