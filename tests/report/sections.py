"""Sections of the report: the commands that it runs, in order, and what a reader should know about each."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from controllers.core.compiled import CORE, PURE
from tests.bench import growth
from tests.bench.__main__ import BY_CORE, PARTS, WITH_PEERS

PYTHON: Final = sys.executable
LOOP: Final = ("--search", "80", "--held-out", "160", "--branches", "24", "--minutes", "2", "--requests", "80")
"""Size of the loop: large enough to find and judge a controller, small enough for ten minutes."""
POWER_CUTS: Final = "tests/faults/test_power_cuts.py"
BENCH_ABOUT: Final = {
    "answers": "The canonical form of answers, and votes of chains on prose and on problems.",
    "replay": "Replay of the public recordings against a hand-written loop that computes the same figures.",
    "sealed": "Controllers from files, which decide in sandboxed processes.",
    "default": "The default controller on public recordings of ten models, against self-consistency with 64 chains.",
    "cascade": "Candidates that a search plays, in the sandbox, unsandboxed, and by the compiled kernel.",
    "ray": "A sweep on a Ray cluster with two workers against one with one worker.",
    "dashboard": "The dashboard's pages on a store with many episodes.",
    "recorder": "Episodes that are written to the store and acknowledged.",
    "edge": "Requests that are passed through, against a bare FastAPI proxy and no proxy.",
    "live": "Controlled requests on the embedded model against one request to vLLM.",
    "collect": "Branches recorded per second.",
    "signals": "The cost of asking vLLM for log-probabilities.",
    "own": "Processor time of the proxy itself, by branches, rounds and their length.",
    "busy": "Many episodes at once on one vLLM: right answers per minute, latency, and who uses the processor.",
    "rivals": "Controllers beside optillm and its_hub: the same problems, the same vLLM, tokens by its own counter.",
    "growth": "Time and memory by the number of episodes, branches, tokens, recordings and rows.",
}


class Section(NamedTuple):
    """One section of the report."""

    name: str
    title: str
    about: str
    command: Callable[[Path], Sequence[str]]  # of the folder that it may write to
    shown: str  # the command as a user would type it
    has_rows: bool = False  # it writes rows of a table to NAME.rows.json in its folder
    picture: str = ""  # file in its folder
    timeout_s: float = 1800.0
    summary: Callable[[Path], str] | None = None  # what its files in the folder say, if it prints nothing
    headlines: str = ""  # expression; the texts in lines of its output that it finds sum the section up
    shortfalls: str = ""  # expression; the texts that it finds say what is not as predicted


def _bench(part: str, *, pure: bool = True) -> Section:
    name = f"bench-{part}" if pure else f"bench-{part}-compiled"

    def command(folder: Path) -> Sequence[str]:
        core = f"{PURE}={1 if pure and part in BY_CORE else ''}"
        rows = folder / f"{name}.rows.json"
        return "env", core, PYTHON, "-m", "tests.bench", part, "--json", str(rows), "--plots", str(folder)

    title = f"Benchmark: {part}" if pure else f"Benchmark: {part}, compiled core"
    shown = f"make bench ARGS={part}" if pure else f"make compile bench ARGS={part}"
    picture = growth.PICTURE if part == "growth" else ""
    return Section(name, title, BENCH_ABOUT.get(part, ""), command, shown, has_rows=True, picture=picture)


def sections(soak_minutes: float, with_peers: bool) -> list[Section]:
    """Return the sections in the order in which they run."""
    return [
        Section(
            "frontier",
            "Accuracy over tokens on the embedded model",
            "The default controller at several β through the public API, greedy decoding, one sample, a vote of 32.",
            lambda folder: (PYTHON, "-m", "proxy.cli", "demo", "--plot", str(folder / "frontier.svg")),
            "make demo",
            picture="frontier.svg",
            headlines=r"The accuracy of .*",
        ),
        Section(
            "loop",
            "The loop of discovery",
            "Branches are recorded, a controller is searched for, judged on held-out problems, promoted, compared live "
            "with what replay predicted, and rolled back.",
            lambda folder: (PYTHON, "-m", "proxy.cli", "loop", "--folder", str(folder / "loop"), *LOOP),
            f'make loop ARGS="{" ".join(LOOP)}"',
            picture="loop/frontier.svg",
            timeout_s=3600.0,
            summary=lambda folder: list_items(folder / "loop" / "report.html"),
            headlines=r"(?:The search tried|Gate against|Live,|found_\w+ reaches) .*",
            shortfalls=r".*\(OUTSIDE\).*",
        ),
        Section(
            "parity",
            "Served episodes against replay",
            "Every decision of the requests that the loop served is taken again, and means are compared.",
            _parity,
            "autotts parity --store loop/served.db --controllers FILE",
            headlines=r"(?:decisions|reproduced): .*",
        ),
        *(_bench(part) for part in PARTS if with_peers or part not in WITH_PEERS),
        *(_bench(part, pure=False) for part in PARTS if CORE.compiled and part in BY_CORE),
        Section(
            "simulation",
            "A fleet under load",
            "A simulation from measured speeds, checked against the real proxy and vLLM at small loads.",
            lambda folder: (PYTHON, "-m", "tests.bench.simulate", "--check", "--out", str(folder / "simulation.svg")),
            "make simulate ARGS=--check",
            picture="simulation.svg",
        ),
        Section(
            "power-cuts",
            "Power cuts and killed servers",
            "SQLite after 300 simulated power cuts, a control that syncs less, and PostgreSQL after kills.",
            lambda folder: ("env", "SOAK_CUTS=300", PYTHON, "-m", "pytest", "-n0", "-q", "-s", POWER_CUTS),
            f"SOAK_CUTS=300 python -m pytest -q -s {POWER_CUTS}",
            headlines=r"(?:with synchronous=NORMAL )?\d+ (?:of \d+ )?(?:cuts|kills).*",
        ),
        Section(
            "soak",
            "Soak",
            "Mixed traffic on the real stack while upstream, store, keys, controllers and connections are disturbed.",
            lambda folder: (PYTHON, "-m", "tests.soak", "--minutes", f"{soak_minutes:g}"),
            f"make soak MINUTES={soak_minutes:g}",
            timeout_s=60 * soak_minutes + 900,  # it also warms up and stops its servers
            headlines=r"(?:memory after|/health:|\d+ bills|nothing was wrong).*",
        ),
        *([_PEERS] if with_peers else []),
    ]


_PEERS: Final = Section(
    "peers",
    "Other proxies",
    "Requests and streams that are passed through, by proxies that are installed in environments of their own.",
    lambda folder: (PYTHON, "-m", "tests.bench", "edge", "--peers", "--json", str(folder / "peers.edge.json")),
    "make bench PEERS=1 ARGS=edge",
)


def _parity(folder: Path) -> Sequence[str]:
    loop = folder / "loop"
    finalist = ",".join(str(path) for path in sorted(loop.glob("found_*.py")))
    return PYTHON, "-m", "proxy.cli", "parity", "--store", str(loop / "served.db"), "--controllers", finalist


def list_items(page: Path) -> str:
    """Return the items of the lists of an HTML page, one a line."""
    items = re.findall(r"<li>(.*?)</li>", page.read_text("utf-8"), re.DOTALL)
    return "\n".join(html.unescape(re.sub(r"<[^>]*>", "", item)).strip() for item in items)
