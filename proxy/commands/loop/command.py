"""Command line of `autotts loop`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proxy.commands.loop.progress import LoopPlan, LoopProgress

Folder = Annotated[Path, typer.Option(help="folder for everything that the loop writes; a loop there is resumed")]
Questions = Annotated[int, typer.Option("--search", min=4, help="questions that the search learns from")]
HeldOut = Annotated[int, typer.Option("--held-out", min=4, help="questions that only the gate sees")]
Branches = Annotated[int, typer.Option(min=2, max=64, help="branches recorded per question")]
Minutes = Annotated[float, typer.Option(min=0, help="minutes of search")]
Latency = Annotated[float, typer.Option(min=0, help="points subtracted per doubling of the critical path")]
Orders = Annotated[int, typer.Option("--shuffles", min=1, help="branch orders in the gate and in the picture")]
Requests = Annotated[
    int, typer.Option("--requests", min=2, help="fresh questions asked before and after the promotion")
]
DeployedBeta = Annotated[float, typer.Option("--beta", min=0, max=1, help="β of the fresh requests")]
Force = Annotated[
    bool,
    typer.Option("--force", help="roll it out even if the gate does not promote it; the audit says so"),
]
Seed = Annotated[int, typer.Option(min=0, help="seed of the questions and of the search")]


async def run_loop(folder: Path, plan: LoopPlan, console: Console) -> None:
    """Run a loop, or the rest of one, and print its summary. Raises DiscoveryError and ProxyError."""
    from proxy.commands.loop.report import write_report
    from proxy.commands.loop.stages import LoopStages

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    async with LoopStages(LoopProgress.open(folder, plan), say) as stages:
        await stages.run()
        for line in write_report(stages):
            say(line)
    say(f"report: {folder / 'report.html'}")
