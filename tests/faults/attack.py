"""Run every attack in `hostile/` for real: `python -m tests.faults.attack [--open]` prints the outcome of each.

An attack is a controller file. Most define only `attack(state)`, which returns what it got hold of, and `BODY` is
appended. `--open` leaves the seal off, for the test that shows that the suite can fail; run it in a container only.
Set `AUTOTTS_UPSTREAM_API_KEY=canary` in the environment: attacks look for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from controllers import (
    BoundaryViolation,
    Controller,
    ControllerError,
    IllegalAction,
    Limits,
    MachineDisturbed,
    State,
    run_episode,
)
from controllers.loading import Spec
from controllers.sandbox.controller import SandboxedController
from controllers.sandbox.deadline import Clock
from controllers.sandbox.seal import ALL_LAYERS, Layer
from controllers.sandbox.spawner import SandboxSpawner
from tests.fakes import ScriptedEnvironment, chain
from tests.faults.calls import X86_64

FOLDER: Final = Path(__file__).parent / "hostile"
HARD_S: Final = 0.25
BODY: Final = """

from controllers import TO_END, answer, branch


class Hostile:
    def __init__(self, beta):
        self.tried = False

    def decide(self, state):
        if not state.width:
            return [branch(), branch(TO_END)]
        if not self.tried:
            self.tried = True
            obtained = attack(state)
            if obtained:
                raise RuntimeError(f"ESCAPED: {obtained}")
        return [answer(state.leader())]
"""


class Outcome(NamedTuple):
    """The outcome of an attack."""

    how: str  # "escaped", the boundary that was crossed, "illegal", "raised", or "harmless" (ended normally)
    message: str
    late_s: float  # time by which it exceeded its deadline


def attacks() -> dict[str, str]:
    """Return the source of every attack by its name."""
    sources = {}
    for path in sorted(FOLDER.glob("*.py")):
        source = path.read_text()
        if path.stem == "raw_call":
            if platform.machine() == "x86_64":
                for name, (number, *arguments) in X86_64.items():
                    filled = source.replace("39, ()", f"{number}, {tuple(arguments)!r}")
                    sources[f"raw {name}"] = filled + BODY
        else:
            sources[path.stem] = source if "class Hostile" in source or "class Endless:" in source else source + BODY
    return sources


async def make(spawner: SandboxSpawner, name: str, source: str) -> Outcome:
    """Run an episode under an attack with wall-clock deadlines, or with CPU-time ones on a busy machine."""
    try:
        return await _make(spawner, name, source, Clock.WALL)
    except MachineDisturbed:
        return await _make(spawner, name, source, Clock.CPU)


async def _make(spawner: SandboxSpawner, name: str, source: str, clock: Clock) -> Outcome:
    worker = spawner.spawn(HARD_S, clock)
    began = time.monotonic()
    allowed = HARD_S

    class TimedController:
        def __init__(self, controller: Controller) -> None:
            self.controller = controller

        def decide(self, state: State) -> Any:
            nonlocal began
            began = time.monotonic()
            return self.controller.decide(state)

    try:
        allowed = 2.0  # a file may take longer to load than a decision
        worker.load(Spec(name, source))
        allowed = HARD_S
        chains = [chain("7", 60, ["7"]), chain("8", 90, ["8"], mark="b")]
        controller = TimedController(SandboxedController(worker, 0.5))
        await run_episode(controller, ScriptedEnvironment(chains, 10), State(Limits(10)))
        how, message = "harmless", ""
    except BoundaryViolation as error:
        how, message = str(error.boundary), str(error)
    except IllegalAction as error:
        how, message = "illegal", str(error)
    except ControllerError as error:
        if isinstance(error.__cause__, MachineDisturbed):  # the runner wraps what the timed controller raises
            raise error.__cause__ from None
        how, message = "escaped" if "ESCAPED" in str(error) else "raised", str(error)
    finally:
        took = time.monotonic() - began
        worker.close()
    return Outcome(how, message, max(0.0, took - allowed))


async def main() -> None:
    spawner = SandboxSpawner(Layer(0) if "--open" in sys.argv else ALL_LAYERS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {name: (await make(spawner, name, source))._asdict() for name, source in attacks().items()}
    spawner.close()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    json.dump({"user": os.geteuid(), "grown_kib": grown, "outcomes": outcomes}, sys.stdout, indent=1)


if __name__ == "__main__":
    asyncio.run(main())
