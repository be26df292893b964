"""Profile of the proxy while it serves requests: function calls per request, and which parts its time goes to.

    python -m tests.bench.request_profile [forwarded|controlled]

The profiler makes each call dearer, so the shares serve to compare parts and versions. `make bench ARGS=own` has times.
"""

from __future__ import annotations

import asyncio
import os
import pstats
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import aiohttp
from rich.console import Console
from rich.table import Table

from tests.bench import own
from tests.bench.generator import BODY, CONNECTIONS, load
from tests.bench.servers import own_module, own_proxy

EACH: Final = 40
"""Forwarded requests of each connection."""
EPISODES: Final = 20
PARTS: Final[Mapping[str, str]] = {
    "proxy/upstream/": "calls to the upstream",
    "/aiohttp/": "calls to the upstream",
    "/multidict/": "calls to the upstream",
    "/yarl/": "calls to the upstream",
    "proxy/http/": "HTTP server",
    "/uvicorn/": "HTTP server",
    "/httptools/": "HTTP server",
    "/starlette/": "Starlette and FastAPI",
    "/fastapi/": "Starlette and FastAPI",
    "proxy/requests/": "checks of the body",
    "/pydantic/": "checks of the body",
    "proxy/admission/": "keys, budgets and the queue",
    "proxy/telemetry/": "metrics and logs",
    "/prometheus_client/": "metrics and logs",
    "proxy/passthrough/": "forwarding",
    "proxy/api/": "forwarding",
    "proxy/environment/": "episodes",
    "proxy/episode/": "episodes",
    "proxy/rollout/": "episodes",
    "controllers/": "episodes",
    "discovery/": "episodes",
    "asyncio/": "tasks, timers and contexts",
    "contextlib.py": "tasks, timers and contexts",
}
"""Part that a file belongs to, by a piece of its path."""
OTHER: Final = "everything else"


class Profile(NamedTuple):
    """Profile of a number of requests."""

    calls: float  # per request
    shares: Mapping[str, float]  # of the time, by part


async def profile(kind: str) -> Profile:
    """Serve requests with a proxy under the profiler, and return its profile."""
    with TemporaryDirectory() as folder:
        output, controller = Path(folder) / "profile", Path(folder) / "lockstep.py"
        controller.write_text(own.CONTROLLER)
        count = await _serve(kind, output, controller)
        stats = pstats.Stats(str(output))
    times = _times(stats)
    total = sum(times.values())
    shares = {part: seconds / total for part, seconds in times.most_common()}
    return Profile(stats.total_calls / count, shares)  # type: ignore[attr-defined]


async def _serve(kind: str, output: Path, controller: Path) -> int:
    """Serve requests, and write the profile to `output` at the end. Return the number of requests."""
    module, name = ("tests.bench.null_vllm", "serve") if kind == "controlled" else ("tests.bench.null", "backend")
    settings = {
        "ui": "false",
        "controller": str(controller),
        "interval": str(own.INTERVAL),
        "allow_unsandboxed": "true",
    }
    async with own_module(module, name) as upstream:
        program = ("tests.bench.profiled_proxy", str(output))
        async with own_proxy(upstream.url, settings, program=program) as server, aiohttp.ClientSession() as http:

            async def ask(count: int) -> int:
                if kind == "controlled":
                    await own.cost_ms(server, http, own.INTERVAL * own.ROUNDS, own.ROUNDS, count)
                    return count
                return len((await load(server.url, BODY, CONNECTIONS, 0, lambda: repeat(True, count)))[0])

            await ask(1)  # warm up
            os.kill(server.pid, signal.SIGUSR1)
            return await ask(EPISODES if kind == "controlled" else EACH)


def _times(stats: pstats.Stats) -> Counter[str]:
    """Return the seconds of each part. Functions written in C count for the part that calls them."""
    times: Counter[str] = Counter()
    entries: Mapping[Any, Any] = stats.stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, seconds, _, callers) in entries.items():
        if "run_until_complete" in name:
            continue  # it waits
        if file == "~" and callers:
            for (caller, _, _), (_, _, own_seconds, _) in callers.items():
                times[_part(caller)] += own_seconds
        else:
            times[_part(file)] += seconds
    return times


def _part(file: str) -> str:
    return next((part for piece, part in PARTS.items() if piece in file), OTHER)


def main() -> None:
    """Print the profile of the kind of request that the command names."""
    kind = sys.argv[1] if len(sys.argv) > 1 else "forwarded"
    if kind not in ("forwarded", "controlled"):
        raise SystemExit(f"unknown kind {kind}; use forwarded or controlled")
    profiled = asyncio.run(profile(kind))
    table = Table(title=f"{kind} request: {profiled.calls:,.0f} function calls", title_justify="left")
    table.add_column("part")
    table.add_column("share of the time")
    for part, share in profiled.shares.items():
        table.add_row(part, f"{share:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
