"""Simulate a fleet under load: goodput, latency and tokens of self-consistency and of controllers.

    python -m tests.bench.simulate [--quick] [--check] [--upstream URL] [--recordings PATH] [--out simulation.svg]

The speed of a replica is measured first, on the embedded model in a real vLLM, and so is the processor time that the
proxy spends on requests and rounds. Episodes are what controllers do on recordings, without a model. The simulation
(`tests/bench/fleet.py`) then serves them at rising loads, with Poisson and with bursty arrivals, with and without
budgets. `--check` serves small loads by the real proxy and the real vLLM too, and compares. At the end it says which
part of a fleet for a thousand requests a second needs how many units.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from controllers import Limits, State, run_episode
from controllers.episode import run_sync
from controllers.loading import make, parse_spec
from controllers.state import Round
from discovery.data.recordings import Recording, Split
from discovery.evaluation.evaluate import AnswerComparison, read_scorable_cell
from discovery.evaluation.plot import COLOURS
from discovery.evaluation.replay import ReplayEnvironment, branch_order
from discovery.evaluation.sources import open_source
from tests.bench.fleet import Budget, EpisodePlan, Fleet, Outcome, Simulation, bursty, poisson
from tests.bench.real_load import BATCHES, CHAMPION, SEED, Policy, Speeds, measure, real_stack, serve_really
from tests.bench.rows import Size

LOADS: Final = (0.25, 0.5, 0.75, 0.9, 1.0, 1.2, 2.0, 3.0)
"""Loads of the curves, as shares of what self-consistency with 16 chains can sustain."""
PRINTED_LOADS: Final = (0.5, 0.9, 1.2, 2.0)
"""Loads that the tables show; the picture shows all."""
TARGET: Final = 1_000.0
"""Requests a second that the last table plans for."""
BUSY: Final = 0.8
"""Share of its time in which a unit of that fleet may work."""


POLICIES: Final = (
    Policy("1 chain", parse_spec("self_consistency"), 0.0),
    Policy("SC@4", parse_spec("self_consistency"), 2 / 6),
    Policy("SC@16", parse_spec("self_consistency"), 4 / 6),
    Policy("adaptive_consistency, β = 0.5", parse_spec("adaptive_consistency"), 0.5),
    Policy("grammar-136-5, β = 0.25", parse_spec(str(CHAMPION / "champion.py")), 0.25),
    Policy("grammar-136-5, β = 0.5", parse_spec(str(CHAMPION / "champion.py")), 0.5),
)


def plans_of(policy: Policy, recordings: Sequence[Recording], shuffles: int, max_branches: int) -> list[EpisodePlan]:
    """Return what a policy does on each recording in each of some orders of its branches."""
    plans = []
    for recording in recordings:
        for shuffle in range(shuffles):
            environment = ReplayEnvironment(recording, branch_order(recording, shuffle))
            state = State(Limits(recording.interval, min(max_branches, recording.branches)))
            rounds: list[list[int]] = []

            def add(_: State, played: Round, rounds: list[list[int]] = rounds) -> None:
                tokens: dict[int, int] = {}
                for fact in played.facts:
                    tokens[fact.branch] = tokens.get(fact.branch, 0) + fact.tokens
                rounds.append([each for each in tokens.values() if each])

            run_sync(run_episode(make(policy.spec, policy.beta), environment, state, add))
            plans.append(EpisodePlan(rounds, environment.is_right(state.answer)))
    return plans


def read_recordings(path: Path) -> list[Recording]:
    """Return the recordings of the first cell of the held-out split, or of the first cell."""
    source = open_source(path)
    cells = source.cells()
    cell = next((each for each in cells if each.split is Split.HELD_OUT), cells[0])
    return read_scorable_cell(source, cell, AnswerComparison.AUTO)[0]


# Simulation


def capacity(fleet: Fleet, plans: Sequence[EpisodePlan]) -> float:
    """Return the requests a second that a fleet serves if all replicas run full batches all the time."""
    tokens = statistics.fmean(plan.tokens for plan in plans)
    full = fleet.max_sequences / fleet.curve.step_s(fleet.max_sequences)
    return fleet.replicas * full / tokens


def curves(
    fleet: Fleet, plans: Mapping[str, Sequence[EpisodePlan]], requests: int, is_bursty: bool
) -> dict[str, list[tuple[float, Outcome]]]:
    """Return the outcomes of each policy at each load: (requests a second, outcome)."""
    reference = capacity(fleet, plans["SC@16"])
    found: dict[str, list[tuple[float, Outcome]]] = {}
    for label, episodes in plans.items():
        for share in LOADS:
            rate, rng = share * reference, random.Random(SEED)
            arrivals = bursty(rate, rng) if is_bursty else poisson(rate, rng)
            outcome = Simulation(fleet, seed=SEED).serve(episodes, arrivals, requests)
            found.setdefault(label, []).append((rate, outcome))
    return found


def table_of(title: str, found: Mapping[str, Sequence[tuple[float, Outcome]]]) -> Table:
    """Return the outcomes as a table."""
    table = Table(title=title)
    headings = ("policy", "requests/s", "right/s", "right, %", "p50 s", "p95 s", "tokens/request", "replica busy, %")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for label, outcomes in found.items():
        for share, (rate, outcome) in zip(LOADS, outcomes, strict=True):
            if share not in PRINTED_LOADS:
                continue
            served = max(1, len(outcome.latencies_s))
            middle = outcome.latencies_s[served // 2] if outcome.latencies_s else 0.0
            table.add_row(
                label,
                f"{rate:,.2f}",
                f"{outcome.goodput:,.2f}",
                f"{100 * outcome.right / served:.1f}",
                f"{middle:,.2f}",
                f"{outcome.p95_s:,.2f}",
                f"{outcome.tokens / served:,.0f}",
                f"{100 * outcome.replica_busy:.0f}",
            )
    return table


def budget_table(fleet: Fleet, plans: Sequence[EpisodePlan], requests: int, keys: int = 20) -> Table:
    """Return what per-key budgets do to a load of twice the capacity: who is refused, and what one key spends."""
    cap = max(plan.tokens for plan in plans)
    table = Table(title=f"budgets of {keys} keys by Zipf's law, twice the load that the fleet can serve")
    for heading in ("tokens a minute per key", "refused, %", "most that one key spent", "p95 s"):
        table.add_column(heading, justify="right")
    rate = 2 * capacity(fleet, plans)
    for minute in (None, 8 * cap, 2 * cap):
        budget = Budget(keys, sys.maxsize if minute is None else minute, cap)
        outcome = Simulation(fleet, budget, SEED).serve(plans, poisson(rate, random.Random(SEED)), requests)
        refused = 100 * outcome.refused / max(1, outcome.offered)
        limit = "none" if minute is None else f"{minute:,}"
        table.add_row(limit, f"{refused:.0f}", f"{outcome.most_per_key:,}", f"{outcome.p95_s:,.1f}")
    return table


class Demand(NamedTuple):
    """Number of units of one part of a fleet that `TARGET` requests a second need."""

    part: str
    per_request: str
    unit: str
    units: float


def demands(speeds: Speeds, fleet: Fleet, plans: Sequence[EpisodePlan]) -> list[Demand]:
    """Return the units that `TARGET` requests a second need of each part, the part that needs most of them first."""
    tokens = statistics.fmean(plan.tokens for plan in plans)
    rounds = statistics.fmean(len(plan.rounds) for plan in plans)
    cpu_s = speeds.request_cpu_s + rounds * speeds.round_cpu_s
    full = fleet.max_sequences / speeds.curve.step_s(fleet.max_sequences)
    path = statistics.fmean(sum(max(each, default=0) for each in plan.rounds) for plan in plans)
    in_flight = TARGET * path * speeds.curve.step_s(int(BUSY * fleet.max_sequences))
    found = [
        Demand("vLLM replicas", f"{tokens:,.0f} tokens", f"{full:,.0f} tokens/s", TARGET * tokens / full / BUSY),
        Demand("proxy processes", f"{1e3 * cpu_s:.1f} ms of a core", "1 core", TARGET * cpu_s / BUSY),
        Demand("proxies by AUTOTTS_MAX_EPISODES", f"{in_flight / TARGET:.2f} s", "256 episodes", in_flight / 256),
    ]
    return sorted(found, key=lambda demand: -demand.units)


def demand_table(label: str, found: Sequence[Demand]) -> Table:
    """Return the demands as a table."""
    table = Table(title=f"{label}: units for {TARGET:,.0f} requests a second, {100 * BUSY:.0f} % busy")
    for heading in ("part", "per request", "one unit", "units"):
        table.add_column(heading)
    for demand in found:
        table.add_row(demand.part, demand.per_request, demand.unit, f"{demand.units:,.1f}")
    return table


def draw(poisson_found: Mapping[str, Sequence[tuple[float, Outcome]]], path: Path) -> None:
    """Draw goodput, p95 latency and tokens per second against the offered load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for number, (label, outcomes) in enumerate(poisson_found.items()):
        rates = [rate for rate, _ in outcomes]
        lines = (
            [outcome.goodput for _, outcome in outcomes],
            [outcome.p95_s for _, outcome in outcomes],
            [outcome.tokens / outcome.seconds for _, outcome in outcomes],
        )
        for axes, values in zip(panels, lines, strict=True):
            axes.plot(rates, values, marker="o", color=COLOURS[number % len(COLOURS)], label=label)
    for axes, title in zip(panels, ("right answers a second", "p95 latency, s", "tokens a second"), strict=True):
        axes.set(title=title, xlabel="requests a second")
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


# Check against the real stack


class Check(NamedTuple):
    """A load, served by the real stack and by the simulation."""

    label: str
    rate: float
    real_mean_s: float
    simulated_mean_s: float
    real_tokens_s: float
    simulated_tokens_s: float


async def check(size: Size, speeds: Speeds, plans: Mapping[str, Sequence[EpisodePlan]]) -> list[Check]:
    """Serve loads of half and of nearly all of the capacity by both."""
    fleet = fleet_of(speeds, replicas=1)
    requests, found = size.pick(60, 3), []
    async with real_stack(size) as (url, _, http):
        for policy in POLICIES:
            if policy.label not in ("SC@16", "grammar-136-5, β = 0.5"):
                continue
            for share in (0.4, 0.8):
                rate = share * capacity(fleet, plans[policy.label])
                real = await serve_really(http, url, policy, rate, requests)
                arrivals = poisson(rate, random.Random(SEED))
                simulated = Simulation(fleet, seed=SEED).serve(plans[policy.label], arrivals, 20 * requests)
                mean = statistics.fmean(simulated.latencies_s)
                found.append(Check(policy.label, rate, *real[:1], mean, real[1], simulated.tokens / simulated.seconds))
    return found


def check_table(found: Sequence[Check]) -> Table:
    """Return the comparison as a table."""
    table = Table(title="simulated against the real proxy and vLLM on this machine, Poisson arrivals")
    headings = ("policy", "requests/s", "mean s, real", "simulated", "ratio", "tokens/s, real", "simulated", "ratio")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for each in found:
        table.add_row(
            each.label,
            f"{each.rate:.2f}",
            f"{each.real_mean_s:.2f}",
            f"{each.simulated_mean_s:.2f}",
            f"{each.simulated_mean_s / each.real_mean_s:.2f}",
            f"{each.real_tokens_s:,.0f}",
            f"{each.simulated_tokens_s:,.0f}",
            f"{each.simulated_tokens_s / each.real_tokens_s:.2f}",
        )
    return table


def fleet_of(speeds: Speeds, replicas: int) -> Fleet:
    """Return a fleet of replicas and one proxy process each, as fast as measured."""
    return Fleet(
        replicas,
        speeds.curve,
        max_sequences=max(BATCHES),
        proxies=replicas,
        request_cpu_s=speeds.request_cpu_s,
        round_cpu_s=speeds.round_cpu_s,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, simulate, print tables and draw."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.simulate", description="Simulate a fleet under load.")
    parser.add_argument("--quick", action="store_true", help="smallest sizes; the figures mean nothing")
    parser.add_argument("--check", action="store_true", help="compare with the real proxy and vLLM")
    parser.add_argument("--upstream", default="", help="URL of a vLLM with the embedded model that runs already")
    parser.add_argument("--recordings", type=Path, default=CHAMPION / "recordings.jsonl.xz")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("build/simulation.svg"))
    given = parser.parse_args(arguments)
    size = Size(given.quick, given.upstream)
    console = Console(width=140)
    recordings = read_recordings(given.recordings)
    plans = {each.label: plans_of(each, recordings, size.pick(20, 1), 48) for each in POLICIES}
    speeds = asyncio.run(measure(size))
    steps = ", ".join(f"{sequences}: {1e3 * seconds:.2f}" for sequences, seconds in speeds.points)
    console.print(f"milliseconds of a step by running sequences: {steps}")
    console.print(
        f"fitted: {1e3 * speeds.curve.base_s:.2f} ms + {1e3 * speeds.curve.sequence_s:.3f} ms per sequence; the proxy: "
        f"{1e3 * speeds.request_cpu_s:.1f} ms per request + {1e3 * speeds.round_cpu_s:.2f} ms per round"
    )
    fleet, requests = fleet_of(speeds, given.replicas), size.pick(2_000, 20)
    found = curves(fleet, plans, requests, is_bursty=False)
    console.print(table_of(f"{given.replicas} replicas, Poisson arrivals", found))
    bursts = curves(fleet, plans, requests, is_bursty=True)
    console.print(table_of(f"{given.replicas} replicas, bursts of four times the mean load", bursts))
    console.print(budget_table(fleet, plans["SC@16"], requests))
    for label in ("SC@16", "grammar-136-5, β = 0.5"):
        console.print(demand_table(label, demands(speeds, fleet, plans[label])))
    if given.check:
        console.print(check_table(asyncio.run(check(size, speeds, plans))))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw(found, given.out)
    console.print(f"drawn: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
