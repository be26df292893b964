"""Build served episodes without a proxy: run controllers on recorded branches and store them as a proxy would."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from controllers import Controller, Limits, Round, State, run_episode, run_sync
from controllers.loading import Spec, make
from discovery.data.packed_rounds import pack_rounds
from discovery.data.recordings import Origin, RecordedQuestion, intern_answers
from discovery.evaluation.replay import ReplayEnvironment
from discovery.store import EpisodeDetails, ServedEpisode, Store


def serve(
    recorded: RecordedQuestion,
    spec: Spec,
    beta: float,
    request: str,
    limits: Limits | None = None,
    controller: Controller | None = None,
    **changes: Any,
) -> ServedEpisode:
    """Return the episode of a controller on a recording, its branches opened in recorded order."""
    limits = limits or Limits(recorded.interval, len(recorded.branches))
    recording = intern_answers(recorded)
    environment = ReplayEnvironment(recording, range(recording.branches), signals=spec.signals)
    state, rounds = State(limits), list[Round]()

    def keep(_: State, played: Round) -> None:
        rounds.append(Round(list(played.actions), played.facts))

    run_sync(run_episode(controller or make(spec, beta), environment, state, keep))
    answers = [recording.answers[number] for number in environment.revealed]
    about = EpisodeDetails(
        limits=asdict(limits), decided=len(rounds), spent=state.spent, answers=answers, fallback=None
    )
    known: dict[str, Any] = {
        "rounds": len(rounds),
        "branches": state.width,
        "ledger": state.ledger() | {"finalise": 7, "aborted": 0},
        "stop": str(state.stop),
        "answer": None if state.answer is None else answers[state.answer],
        "question": recorded.question,
        "about": about,
        "trace": pack_rounds(rounds),
    }
    return ServedEpisode(request, request, recorded.model, spec.name, spec.digest, beta, **(known | changes))


def live(recorded: RecordedQuestion, request: str) -> RecordedQuestion:
    """Return the recording as if it had been made live for `request`."""
    return replace(recorded, benchmark="live", origin=Origin.LIVE, request=request)


def write(path: Path, episodes: Sequence[ServedEpisode], recordings: Sequence[RecordedQuestion] = ()) -> Path:
    """Write a store of the episodes and recordings and return its path."""

    async def go() -> None:
        async with Store.open(path, create=True) as store:
            await store.add_all([*episodes, *recordings])

    asyncio.run(go())
    return path
