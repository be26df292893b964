"""Replay the recorded branches of a request under another controller or β."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from controllers import ControllerError, State, Stop, run_episode
from controllers.loading import Spec
from discovery.audit.decision_replay import Decider, run_under_controller
from discovery.audit.explain import display_answer
from discovery.audit.served_episodes import limits_of
from discovery.data.recordings import RecordedQuestion, intern_answers
from discovery.errors import BranchCensored, TraceError
from discovery.evaluation.replay import ReplayEnvironment
from discovery.store.records import ServedEpisode


class WhatIfResult(NamedTuple):
    """The episode that another controller would have run."""

    answer: str | None
    tokens: int
    branches: int
    rounds: int
    stop: Stop
    votes: list[tuple[str, int]]  # of finished branches, most votes first
    is_exhausted: bool  # it opened every recorded branch, and might have opened more live


def what_if(episode: ServedEpisode, recorded: RecordedQuestion, spec: Spec, beta: float) -> WhatIfResult:
    """Replay a request's recorded branches, in their order and under its limits, with a controller.

    The cap on branches is the number that was recorded, if that is smaller. A controller from a file decides in a
    sandbox. Raises TraceError if the recording cannot be replayed with this controller, ControllerError if it does not
    load, SandboxUnavailable and MachineDisturbed.
    """
    recording = intern_answers(recorded)
    served = limits_of(episode)
    limits = replace(served, max_branches=min(served.max_branches, recording.branches))

    async def run(decider: Decider) -> tuple[ReplayEnvironment, State]:
        environment = ReplayEnvironment(recording, range(recording.branches), signals=spec.signals)
        state = State(limits)
        await _play(decider, environment, state)
        return environment, state

    ((environment, state),) = run_under_controller(spec, beta, limits, [run])
    if state.stop is None:
        raise TraceError(f"{spec.name} did not end the episode")
    texts = [display_answer(recording.answers[number]) for number in environment.revealed]
    votes = sorted(state.votes.items(), key=lambda item: -item[1])
    return WhatIfResult(
        None if state.answer is None else texts[state.answer],
        state.spent,
        state.width,
        state.rounds,
        state.stop,
        [(texts[label], count) for label, count in votes],
        state.width == recording.branches < served.max_branches,
    )


async def _play(decider: Decider, environment: ReplayEnvironment, state: State) -> None:
    """Run an episode to its end. Errors of the controller end it, as they do live."""
    try:
        await run_episode(decider, environment, state)
    except ControllerError:
        state.end(Stop.CONTROLLER_ERROR)
    except BranchCensored:
        state.end(Stop.UPSTREAM_ERROR)
