"""Every attack in `hostile/`, made for real: `python -m tests.faults.attack [--open]` prints what became of each.

An attack is a controller file; most only define `attack(state)`, which returns what it got hold of, and are given the
body below. `--open` leaves the seal off: for the test that shows that the suite can fail, in a container of its own.
Start it with `AUTOTTS_UPSTREAM_API_KEY=canary` in its environment, for attacks to look for.
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
            found = attack(state)
            if found:
                raise RuntimeError(f"ESCAPED: {found}")
        return [answer(state.leader())]
"""


class Outcome(NamedTuple):
    """What became of an attack."""

    how: str  # "escaped", a boundary that was crossed, "illegal", "raised", or "harmless": it ended as honest ones do
    words: str
    late_s: float  # by how much it outlived its deadline


def attacks() -> dict[str, str]:
    """The source of every attack by its name."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        source = path.read_text()
        if path.stem == "raw_call":
            if platform.machine() == "x86_64":
                for name, (number, *arguments) in X86_64.items():
                    filled = source.replace("39, ()", f"{number}, {tuple(arguments)!r}")
                    found[f"raw {name}"] = filled + BODY
        else:
            found[path.stem] = source if "class Hostile" in source or "class Endless:" in source else source + BODY
    return found


async def make(spawner: SandboxSpawner, name: str, source: str) -> Outcome:
    """Play an episode under an attack, timed as live ones are; on a machine too busy for that, as replayed ones."""
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
        how, words = "harmless", ""
    except BoundaryViolation as error:
        how, words = str(error.boundary), str(error)
    except IllegalAction as error:
        how, words = "illegal", str(error)
    except ControllerError as error:
        if isinstance(error.__cause__, MachineDisturbed):  # the runner wraps what the timed controller raises
            raise error.__cause__ from None
        how, words = "escaped" if "ESCAPED" in str(error) else "raised", str(error)
    finally:
        took = time.monotonic() - began
        worker.close()
    return Outcome(how, words, max(0.0, took - allowed))


async def main() -> None:
    spawner = SandboxSpawner(Layer(0) if "--open" in sys.argv else ALL_LAYERS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {name: (await make(spawner, name, source))._asdict() for name, source in attacks().items()}
    spawner.close()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    json.dump({"user": os.geteuid(), "grown_kib": grown, "outcomes": outcomes}, sys.stdout, indent=1)


if __name__ == "__main__":
    asyncio.run(main())
