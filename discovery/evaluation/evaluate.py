"""The evaluator: controllers scored on cells of recordings, as `autotts evaluate` and the discovery loop ask for it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from controllers.loading import Spec
from controllers.sandbox.deadline import Clock
from discovery.answers import Judge, Labels, canonical
from discovery.data.recordings import Cell, LabelSource, Origin, RecordedQuestion, Recording, Version, intern_answers
from discovery.errors import RecordingsNotFound
from discovery.evaluation.engines import Engine, RecordingBatch
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules, make_jobs
from discovery.evaluation.scores import QuestionGrading, Score, gather_scores, recording_limit_warnings
from discovery.evaluation.sources import RecordingSource

log = logging.getLogger(__name__)

Weights = Mapping[LabelSource, float | None]
"""What a question counts for, by how its right answer is known: a number, or None for as much as that is sure.

Questions of a source that is not named are left out.
"""
DEFAULT_WEIGHTS: Final[Weights] = MappingProxyType({LabelSource.REFERENCE: 1.0, LabelSource.FEEDBACK: 1.0})
"""A vote is no measure of who votes, so what is known by consensus alone is scored only if it is asked for."""


class AnswerComparison(StrEnum):
    """When two recorded answers are the same."""

    EXACT = "exact"  # as strings, as in the published tables
    CANONICAL = "canonical"  # read as the proxy reads them
    AUTO = "auto"  # exact where all recordings were imported, else canonical: models spell an answer in many ways

    def of(self, recorded: Iterable[RecordedQuestion]) -> AnswerComparison:
        """How recordings are compared: the one it is, or what `AUTO` comes to."""
        if self is not AnswerComparison.AUTO:
            return self
        return (
            AnswerComparison.EXACT
            if all(one.origin is Origin.IMPORTED for one in recorded)
            else AnswerComparison.CANONICAL
        )


ANSWERS_HELP: Final = "when two answers are the same; auto: exact where all was imported, else canonical"
"""What `--answers` says, in words."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that is to be scored, and how."""

    source: RecordingSource
    cells: Sequence[Cell]
    specs: Sequence[Spec]
    betas: Sequence[float]
    shuffles: int
    answers: AnswerComparison = AnswerComparison.AUTO
    rules: ReplayRules = field(default_factory=ReplayRules)
    weights: Weights = field(default_factory=lambda: DEFAULT_WEIGHTS)
    version: str = ""  # beginning of the digest of the version that is scored; none means as `scorable` says

    @property
    def work(self) -> int:
        """How many times a cell's questions are gone through."""
        return len(self.cells) * len(self.specs) * len(self.betas) * self.shuffles

    def run(self, engine: Engine, on_progress: Callable[[int], None] = lambda done: None) -> list[Score]:
        """A score for each cell, controller and β, in that order.

        `on_progress` is told how much of `work` has been done since it was last called. Raises RecordingsNotFound,
        BadRecording, Censored, EngineError, TraceError.
        """
        graded: dict[Cell, QuestionGrading] = {}
        branches: dict[Cell, list[int]] = {}
        with Judge(clock=Clock.CPU) as judge:
            played = gather_scores(_told(engine(self._batches(judge, graded, branches), self.rules), on_progress))
            found = [
                replace(
                    score,
                    grading=graded[score.cell],
                    recorded=branches[score.cell],
                    max_branches=self.rules.max_branches,
                )
                for score in played
            ]
        for line in recording_limit_warnings(found):
            log.warning("%s", line)
        return found

    def _batches(
        self, judge: Judge, graded: dict[Cell, QuestionGrading], branches: dict[Cell, list[int]]
    ) -> Iterator[RecordingBatch]:
        """One batch a cell; its recordings are read when it is asked for, and how they are graded is noted."""
        for cell in self.cells:
            recorded = scorable_recordings(self.source, cell, self.weights, self.version)
            weights = [_weight(one, self.weights) for one in recorded]
            answers = self.answers.of(recorded)
            graded[cell] = QuestionGrading([one.label_source for one in recorded], weights, answers)
            recordings = [_interned(one, answers, judge) for one in recorded]
            branches[cell] = [recording.branches for recording in recordings]
            most = min(branches[cell])
            for spec in self.specs:
                if spec.chains > min(most, self.rules.max_branches):
                    raise RecordingsNotFound(
                        f"{spec.name} opens {spec.chains} branches; {' '.join(cell)} has {most} a question, "
                        f"and --max-branches is {self.rules.max_branches}"
                    )
            yield RecordingBatch(recordings, make_jobs(self.specs, self.betas, cell, self.shuffles))


def read_scorable_cell(
    source: RecordingSource, cell: Cell, answers: AnswerComparison, judge: Judge | None = None
) -> tuple[list[Recording], AnswerComparison]:
    """What of a cell is scored, unless it is asked for otherwise, and how its answers are compared. Raises
    RecordingsNotFound."""
    found = scorable_recordings(source, cell)
    answers = answers.of(found)
    return [_interned(recorded, answers, judge) for recorded in found], answers


def scorable_recordings(
    source: RecordingSource, cell: Cell, weights: Weights = DEFAULT_WEIGHTS, version: str = ""
) -> list[RecordedQuestion]:
    """The complete recordings of a cell whose reference answers count, all of one version; one for each question.

    Without a `version` it is the one there is. Of several made here it is one of those made with the upstream as it was
    last: the sampling that most of them share. What is left out is logged. Raises RecordingsNotFound.
    """
    recorded = source.load(cell)
    kept = _of_one_version(cell, _graded(cell, recorded, weights), version)
    made_here = [one for one in recorded if one.origin is not Origin.IMPORTED]
    if not version and made_here and not any(one.version.upstream == made_here[-1].version.upstream for one in kept):
        log.warning(
            "%s: of the newest version, %s, nothing can be scored", " ".join(cell), made_here[-1].version.digest
        )
    return pool_recordings(kept)


def pool_recordings(recorded: Sequence[RecordedQuestion]) -> list[RecordedQuestion]:
    """One recording a question, version and reference, in order of the first of each; complete ones by themselves.

    Branches of one version are draws from one well, whichever requests they were made for.
    """
    found: dict[object, list[RecordedQuestion]] = {}
    for one in recorded:
        kind = one.question, one.version, one.complete, one.reference, one.label_source
        found.setdefault(kind, []).append(one)
    return [
        of_one[0]
        if len(of_one) == 1
        else replace(of_one[0], branches=[branch for one in of_one for branch in one.branches])
        for of_one in found.values()
    ]


def _interned(recorded: RecordedQuestion, answers: AnswerComparison, judge: Judge | None) -> Recording:
    return intern_answers(recorded) if answers is AnswerComparison.EXACT else regrade(recorded, judge)


def regrade(recorded: RecordedQuestion, judge: Judge | None = None) -> Recording:
    """The recording with its answers read as the proxy reads them; what cannot be read answers nothing."""
    labels = Labels(judge)

    def label(answer: str) -> int | None:
        form = canonical(answer)
        return None if form is None else labels.label_of(form, answer)

    return intern_answers(recorded, label)


def _told(outcomes: Iterator[tuple[Job, JobResult]], tell: Callable[[int], None]) -> Iterator[tuple[Job, JobResult]]:
    for job, played in outcomes:
        tell(len(job.shuffles))
        yield job, played


def _weight(recorded: RecordedQuestion, weights: Weights) -> float:
    """What a recording counts for; nothing if it is left out."""
    weight = weights.get(recorded.label_source, 0.0)
    return recorded.confidence if weight is None else weight


def _graded(cell: Cell, recorded: Sequence[RecordedQuestion], weights: Weights) -> list[RecordedQuestion]:
    """The complete recordings with a reference answer that counts. Raises RecordingsNotFound."""
    name = " ".join(cell)
    known = [one for one in recorded if one.complete and one.reference is not None]
    if not known:
        raise RecordingsNotFound(f"{name}: none of {len(recorded)} recordings is complete and has a reference answer")
    kept = [one for one in known if _weight(one, weights) > 0]
    found = Counter(one.label_source for one in known if _weight(one, weights) <= 0)
    others = " and ".join(f"{found[source]} by {source}" for source in LabelSource if found[source])
    if not kept:
        way = f"`autotts evaluate --labels {','.join(source for source in LabelSource if found[source])}` takes them"
        raise RecordingsNotFound(f"{name}: no right answer is known in a way that counts, only {others}; {way}")
    if others:
        log.warning(
            "%s: left out are recordings whose right answers are known in a way that does not count, %s", name, others
        )
    return kept


def _of_one_version(cell: Cell, kept: Sequence[RecordedQuestion], wanted: str) -> list[RecordedQuestion]:
    """Return the recordings of one version, chosen as `scorable_recordings` describes.

    `wanted` is the beginning of the version's digest, or empty. Raises RecordingsNotFound.
    """
    name = " ".join(cell)
    by_version: dict[Version, list[RecordedQuestion]] = {}
    for one in kept:
        by_version.setdefault(one.version, []).append(one)
    if wanted:
        found = [version for version in by_version if version.digest.startswith(wanted)]
        if len(found) != 1:
            wrong = f"{len(found)} versions begin with {wanted!r}" if found else f"no version {wanted!r} can be scored"
            raise RecordingsNotFound(f"{name}: {wrong}; there are {_listed(by_version)}")
        return by_version[found[0]]
    if len(by_version) == 1:
        return list(kept)
    if any(one.origin is Origin.IMPORTED for one in kept):
        raise RecordingsNotFound(
            f"{name}: recordings of {len(by_version)} versions are not scored together: {_listed(by_version)}; "
            "`autotts evaluate --version` picks one"
        )
    latest = kept[-1].version.upstream
    now = [found for found in by_version.values() if found[0].version.upstream == latest]
    newest = max(reversed(now), key=len)
    del by_version[newest[0].version]
    log.warning(
        "%s: version %s is scored; left out are %s",
        name,
        newest[0].version.digest,
        _listed({newest[0].version: newest, **by_version}, skip=1),
    )
    return newest


def _listed(by_version: Mapping[Version, Sequence[RecordedQuestion]], skip: int = 0) -> str:
    """Each version but the first `skip`: its digest, how many recordings it has, and what is not the same in all."""
    differ = [field for field in Version._fields if len({getattr(version, field) for version in by_version}) > 1]
    words = []
    for version, recorded in list(by_version.items())[skip:]:
        about = ", ".join(f"{field.replace('_', ' ')} {getattr(version, field) or 'unknown'}" for field in differ)
        words.append(f"{version.digest} ({len(recorded)}{': ' if about else ''}{about})")
    return "; ".join(words)
