"""Growth: time and memory against the number of episodes, branches, tokens, recordings and stored rows.

Each size is measured in a process of its own: the proxy in front of a scripted vLLM without a model, or
`tests/bench/growth_child.py`. Time is processor time, which other work of the machine does not change. The exponent of
growth is the slope between the two largest sizes, both axes logarithmic: 1 is linear, 0 is constant.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import aiohttp
from aiohttp import web

from discovery.evaluation.plot import COLOURS
from tests.bench.process_usage import forget_peak, peak_bytes, processor_seconds, resident_bytes
from tests.bench.rows import Row, Size
from tests.bench.servers import ServerFailed, ServerProcess, chat, lists_models, own_proxy
from tests.fakes import MODEL, FakeVLLM, chain

AT_ONCE: Final = (1, 4, 16, 64)
BRANCHES: Final = (1, 4, 16, 64)
LENGTHS: Final = (1_024, 4_096, 16_384, 32_768)
QUESTIONS: Final = (30, 300, 3_000, 10_000)
EPISODES: Final = (1_000, 10_000, 100_000)
KEYS: Final = (10, 100, 1_000, 10_000)
PICTURE: Final = "growth.svg"
TOKENS: Final = 1_024
"""Tokens of a branch where its length does not vary."""
SETTINGS: Final = {"interval": "512", "max_branches": "64"}
LONG: Final = 4
"""Branches of the episodes whose length varies."""
MARK: Final = "a"
"""Letter of which thoughts consist."""
MERGED: Final = chr(0x20000)
"""Character that stands for the id of two of them."""
WORK_S: Final = 0.5
"""Least processor time of a measurement, which is repeated until then: the kernel counts hundredths of a second."""
MOST_REPEATS: Final = 100
LINEAR: Final = 1.15
"""Largest exponent that counts as linear, because figures are not exact."""
REASONS: Final[Mapping[str, str]] = MappingProxyType(
    {"tokens of a branch": "a request to vLLM for each interval sends the ids of the branch so far again"}
)
"""Why a figure may grow faster than linearly, by what its sizes count."""
IN_CHILDREN: Final = (
    ("recordings", "recorded questions", QUESTIONS),
    ("episodes", "episodes in the store", EPISODES),
    ("keys", "keys in use", KEYS),
)
"""Work of `growth_child`, what its sizes count, and the sizes."""


class MergingVLLM(FakeVLLM):
    """Its tokeniser merges two equal letters of a thought into one id, as those of real models do.

    The proxy recognises by this that a letter is no special token. Otherwise it looks for another id, further back.
    """

    async def _tokenise(self, request: web.Request) -> web.Response:
        text = (await request.json()).get("prompt") or ""
        if 2 * MARK not in text:
            return await super()._tokenise(request)
        ids = [ord(char) for char in text.replace(2 * MARK, MERGED)]
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": self.max_length})


class Load(NamedTuple):
    """Requests that the proxy serves together."""

    requests: int
    controller: str
    tokens: int = TOKENS  # of each branch


class LoadAxis(NamedTuple):
    """Loads of the proxy in which one number varies."""

    name: str
    axis: str  # what the number counts
    sizes: Sequence[int]
    load_of: Callable[[int], Load]


LOADS: Final = (
    LoadAxis("episodes of 8 branches", "episodes at once", AT_ONCE, lambda number: Load(number, "self_consistency@8")),
    LoadAxis("an episode", "branches", BRANCHES, lambda number: Load(1, f"self_consistency@{number}")),
    LoadAxis(
        f"an episode of {LONG} probed branches",
        "tokens of a branch",
        LENGTHS,
        lambda number: Load(1, f"parallel_probe@{LONG}", number),
    ),
)


class Cost(NamedTuple):
    """Processor time and memory that one size needs."""

    seconds: Mapping[str, float]  # processor time by step
    memory: int  # bytes at the peak, beyond what the process held before


class Curve(NamedTuple):
    """A figure against a size."""

    name: str
    axis: str  # what sizes count
    sizes: Sequence[int]
    figures: Sequence[float]  # seconds or bytes
    is_memory: bool = False

    @property
    def exponent(self) -> float:
        """Slope between the two largest sizes, both axes logarithmic."""
        small, large = self.sizes[-2:]
        before, after = (max(figure, 1e-9) for figure in self.figures[-2:])
        return math.log(after / before) / math.log(large / small)


async def rows(size: Size) -> list[Row]:
    """Return a row for each curve, and draw all of them."""
    curves = [curve async for curve in _live(size)] + [curve async for curve in _in_children(size)]
    size.plots.mkdir(parents=True, exist_ok=True)
    draw(curves, size.plots / PICTURE)
    return [row_of(curve) for curve in curves]


# Measurements


async def _live(size: Size) -> AsyncIterator[Curve]:
    """Yield the curves of the proxy."""
    last = size.pick(len(AT_ONCE), 2)
    for name, axis, sizes, load_of in LOADS[:: size.pick(1, 2)]:
        costs = [await _serve(load_of(number), size) for number in sizes[:last]]
        for curve in _curves(axis, sizes[:last], costs):
            yield curve._replace(name=f"proxy: {name}, {curve.name}")


async def _serve(load: Load, size: Size) -> Cost:
    """Return what a new proxy needs to serve a load once."""
    vllm = MergingVLLM([chain("7", load.tokens, mark=MARK)], int(SETTINGS["interval"]))
    vllm.max_length = 2 * max(LENGTHS)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is 3 + 4?"}],
        "max_tokens": load.tokens,
        "tts": {"beta": 1.0, "controller": load.controller, "answer": "boxed"},
    }
    async with (
        vllm.serve() as upstream,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
        own_proxy(upstream.url, SETTINGS, lists_models) as proxy,
    ):
        await _ask(http, proxy, body)  # a warm-up
        held = resident_bytes(proxy.pid)
        forget_peak(proxy.pid)
        began, repeats = processor_seconds(proxy.pid), 0
        while not repeats or (processor_seconds(proxy.pid) - began < WORK_S and repeats < size.pick(MOST_REPEATS, 1)):
            await asyncio.gather(*(_ask(http, proxy, body) for _ in range(load.requests)))
            vllm.requests.clear()
            repeats += 1
        seconds = (processor_seconds(proxy.pid) - began) / repeats
        return Cost({"time": seconds}, max(0, peak_bytes(proxy.pid) - held))


async def _ask(http: aiohttp.ClientSession, proxy: ServerProcess, body: Mapping[str, Any]) -> None:
    tts = (await chat(http, proxy.url, body))["tts"]
    if tts["branches"] != int(body["tts"]["controller"].partition("@")[2]):
        raise ServerFailed(f"the proxy did not open as many branches as the controller names: {tts}")


async def _in_children(size: Size) -> AsyncIterator[Curve]:
    """Yield the curves of recordings, of the store and of admission."""
    for work, axis, sizes in IN_CHILDREN:
        numbers = sizes[: size.pick(len(sizes), 2)]
        if work == "episodes" and size.episodes:
            numbers = tuple(sorted({*numbers, size.episodes}))
        if size.is_quick:
            numbers = tuple(number // 10 for number in numbers)
        costs = [await _child(work, number) for number in numbers]
        for curve in _curves(axis, numbers, costs):
            yield curve._replace(name=f"{work}: {curve.name}")


async def _child(work: str, number: int) -> Cost:
    command = [sys.executable, "-m", "tests.bench.growth_child", work, str(number)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")
    figures = json.loads(output)
    return Cost(figures["seconds"], figures["memory"])


def _curves(axis: str, sizes: Sequence[int], costs: Sequence[Cost]) -> Iterator[Curve]:
    """Yield a curve for each step's time, and one of the memory."""
    for step in costs[0].seconds:
        yield Curve(step, axis, sizes, [cost.seconds[step] for cost in costs])
    yield Curve("memory", axis, sizes, [float(cost.memory) for cost in costs], is_memory=True)


# Report


def row_of(curve: Curve) -> Row:
    """Return the row of a curve, which says why it is steeper than linear."""
    last = len(curve.sizes) - 1
    shown = sorted({0, last - 1, last})
    measured = " → ".join(_shown(curve.figures[place], curve.is_memory) for place in shown)
    sizes = " → ".join(f"{curve.sizes[place]:,}" for place in shown)
    verdict = "linear or less" if curve.exponent <= LINEAR else "steeper than linear"
    if curve.exponent > LINEAR and curve.axis in REASONS:
        verdict += f": {REASONS[curve.axis]}"
    return Row(f"growth, {curve.name}; {curve.axis} {sizes}", measured, verdict, f"exponent {curve.exponent:z.2f}")


def _shown(figure: float, is_memory: bool) -> str:
    if is_memory:
        return f"{figure / 2**20:,.1f} MiB"
    return f"{figure:,.2f} s" if figure >= 1 else f"{1000 * figure:,.2f} ms"


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw the curves, a panel of time and one of memory for each axis, with a line of slope 1."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(curve.axis for curve in curves))
    figure = Figure(figsize=(4.2 * len(axes_names), 8), layout="constrained")
    panels = figure.subplots(2, len(axes_names), squeeze=False)
    for column, axis in enumerate(axes_names):
        for is_memory in (False, True):
            panel = panels[int(is_memory)][column]
            drawn = [curve for curve in curves if curve.axis == axis and curve.is_memory == is_memory]
            for number, curve in enumerate(drawn):
                figures = [max(each / (2**20 if is_memory else 1), 1e-6) for each in curve.figures]
                label = f"{curve.name} ({curve.exponent:.2f})"
                panel.plot(curve.sizes, figures, marker="o", color=COLOURS[number % len(COLOURS)], label=label)
            first = max(max(curve.figures[0], 1e-6) / (2**20 if is_memory else 1) for curve in drawn)
            sizes = drawn[0].sizes
            panel.plot(sizes, [first * each / sizes[0] for each in sizes], ":", color="grey", label="linear")
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="MiB" if is_memory else "processor seconds")
            panel.legend(fontsize=6)
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
