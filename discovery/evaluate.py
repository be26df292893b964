"""The evaluator: controllers scored on cells of recordings, as `autotts evaluate` and the discovery loop ask for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from controllers.loading import Spec
from discovery.answers import Judge, Labels, canonical
from discovery.curve import Score, scores
from discovery.engines import Batch, Engine
from discovery.errors import NotRecorded
from discovery.playing import Job, Played, Rules, jobs
from discovery.recordings import Cell, RecordedQuestion, Recording, intern
from discovery.source import Source


class Answers(StrEnum):
    """When two recorded answers are the same."""

    EXACT = "exact"  # as strings, as in the published tables
    CANONICAL = "canonical"  # read as the proxy reads them


@dataclass(frozen=True)
class Evaluation:
    """Everything that is to be scored, and how."""

    source: Source
    cells: Sequence[Cell]
    specs: Sequence[Spec]
    betas: Sequence[float]
    shuffles: int
    answers: Answers = Answers.EXACT
    rules: Rules = field(default_factory=Rules)

    @property
    def work(self) -> int:
        """How many times a cell's questions are gone through."""
        return len(self.cells) * len(self.specs) * len(self.betas) * self.shuffles

    def run(self, engine: Engine, on_progress: Callable[[int], None] = lambda done: None) -> list[Score]:
        """A score for each cell, controller and β, in that order.

        `on_progress` is told how much of `work` has been done since it was last called. Raises NotRecorded,
        BadRecording, Censored, EngineError, TraceError.
        """
        with Judge() as judge:
            return list(scores(_told(engine(self._batches(judge), self.rules), on_progress)))

    def _batches(self, judge: Judge) -> Iterator[Batch]:
        """One batch a cell; its recordings are read when it is asked for."""
        for cell in self.cells:
            recordings = read_cell(self.source, cell, self.answers, judge)
            most = min(recording.branches for recording in recordings)
            for spec in self.specs:
                if spec.chains > min(most, self.rules.max_branches):
                    raise NotRecorded(
                        f"{spec.name} opens {spec.chains} branches; {' '.join(cell)} has {most} a question, "
                        f"and --max-branches is {self.rules.max_branches}"
                    )
            yield Batch(recordings, jobs(self.specs, self.betas, cell, self.shuffles))


def read_cell(source: Source, cell: Cell, answers: Answers, judge: Judge | None = None) -> list[Recording]:
    """What of a cell can be scored. Raises NotRecorded."""
    scorable = _scorable(cell, source.load(cell))
    return [intern(recorded) if answers is Answers.EXACT else regrade(recorded, judge) for recorded in scorable]


def regrade(recorded: RecordedQuestion, judge: Judge | None = None) -> Recording:
    """The recording with its answers read as the proxy reads them; what cannot be read answers nothing."""
    labels = Labels(judge)

    def label(answer: str) -> int | None:
        form = canonical(answer)
        return None if form is None else labels.number(form, answer)

    return intern(recorded, label)


def _told(outcomes: Iterator[tuple[Job, Played]], tell: Callable[[int], None]) -> Iterator[tuple[Job, Played]]:
    for job, played in outcomes:
        tell(len(job.shuffles))
        yield job, played


def _scorable(cell: Cell, recorded: Sequence[RecordedQuestion]) -> list[RecordedQuestion]:
    """The complete recordings with a reference answer, all of one kind. Raises NotRecorded."""
    name = " ".join(cell)
    kept = [one for one in recorded if one.complete and one.reference is not None]
    if not kept:
        raise NotRecorded(f"{name}: none of {len(recorded)} recordings is complete and has a reference answer")
    kinds = {(one.interval, json.dumps(one.sampling, sort_keys=True), one.probe_template) for one in kept}
    if len(kinds) > 1:
        words = "; ".join(f"Δ {delta}, sampling {sampling}, probe {probe!r}" for delta, sampling, probe in kinds)
        raise NotRecorded(f"{name}: recordings of {len(kinds)} kinds are not scored together: {words}")
    return kept
