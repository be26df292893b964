"""The evaluator: scores controllers on cells of recordings, for `autotts evaluate` and the discovery loop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from controllers.loading import Spec
from controllers.sandbox.deadline import Clock
from discovery.answers import Judge, Labels, canonical
from discovery.data.recordings import (
    NO_ANSWER,
    Cell,
    LabelSource,
    Origin,
    RecordedQuestion,
    Recording,
    Version,
    intern_answers,
    pooled_branches,
)
from discovery.errors import RecordingsNotFound
from discovery.evaluation.afs import Anchor, chain_anchor
from discovery.evaluation.engines import Engine, RecordingBatch
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules, make_jobs
from discovery.evaluation.scores import (
    QuestionGrading,
    Score,
    SelectedByOutcome,
    gather_scores,
    recording_limit_warnings,
)
from discovery.evaluation.sources import RecordingSource

T = TypeVar("T")
log = logging.getLogger(__name__)

Weights = Mapping[LabelSource, float | None]
"""Weight of a question by the source of its reference answer; None means the answer's confidence.

Questions of sources that are not named are left out.
"""
DEFAULT_WEIGHTS: Final[Weights] = MappingProxyType({LabelSource.REFERENCE: 1.0, LabelSource.FEEDBACK: 1.0})
"""Default weights. Consensus is left out, because votes would be measured by votes."""
SELECTED_BY_OUTCOME: Final = (
    "the questions labelled by feedback or votes are therefore chosen by their outcome, and accuracy leaves them out. "
    'Send the right answer as feedback ("answer"), or give references to `autotts label`'
)
"""Consequence if right answers of questions that clients judged wrong are unknown, and the way out."""
UNEVEN_FEEDBACK: Final = "accuracy is biased if clients judge right answers more often than wrong ones, or the reverse"
"""Warning for accuracy that counts labels by feedback."""


def unselected_sources(judged_wrong: int) -> tuple[LabelSource, ...]:
    """Return the sources of labels that do not choose questions by their outcome.

    `judged_wrong` is the number that clients judged wrong without a known right answer. Without them, the questions
    labelled by feedback and votes are mainly those that were answered right.
    """
    return (LabelSource.REFERENCE,) if judged_wrong else tuple(LabelSource)


class AnswerComparison(StrEnum):
    """How two recorded answers are compared."""

    EXACT = "exact"  # as strings, like the published tables
    CANONICAL = "canonical"  # in canonical form, like the proxy
    AUTO = "auto"  # exact if all recordings were imported, else canonical: models spell an answer in many ways

    def resolve(self, recorded: Iterable[RecordedQuestion]) -> AnswerComparison:
        """Return how these recordings are compared: what `AUTO` resolves to, or the comparison itself."""
        if self is not AnswerComparison.AUTO:
            return self
        return (
            AnswerComparison.EXACT
            if all(item.origin is Origin.IMPORTED for item in recorded)
            else AnswerComparison.CANONICAL
        )


ANSWERS_HELP: Final = "how answers are compared; auto: exact if all recordings were imported, else canonical"
"""Help text of `--answers`."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the cells and controllers to score, and how."""

    source: RecordingSource
    cells: Sequence[Cell]
    specs: Sequence[Spec]
    betas: Sequence[float]
    shuffles: int
    answers: AnswerComparison = AnswerComparison.AUTO
    rules: ReplayRules = field(default_factory=ReplayRules)
    weights: Weights = field(default_factory=lambda: DEFAULT_WEIGHTS)
    version: str = ""  # beginning of a version's digest; empty: chosen by `scorable_recordings`
    is_warning: bool = True  # whether problems with the recordings are logged
    is_read: bool = False  # whether `read_scorable` has returned them before, and has logged what it found
    anchors: dict[Cell, Anchor] = field(default_factory=dict)  # of the cells that `run` has read

    @property
    def work(self) -> int:
        """Number of passes over a cell's questions."""
        return len(self.cells) * len(self.specs) * len(self.betas) * self.shuffles

    def run(self, engine: Engine, on_progress: Callable[[int], None] = lambda done: None) -> list[Score]:
        """Return a score for each cell, controller and β, in that order.

        `on_progress` is called with the amount of `work` done since the last call. Raises RecordingsNotFound,
        BadRecording, BranchCensored, EngineError, TraceError.
        """
        graded: dict[Cell, QuestionGrading] = {}
        branches: dict[Cell, list[int]] = {}
        probes: dict[Cell, str] = {}
        with Judge(clock=Clock.CPU) as judge:
            results = engine(self._batches(judge, graded, branches, probes), self.rules)
            played = gather_scores(_report_progress(results, on_progress))
            complete = [
                replace(
                    score,
                    grading=graded[score.cell],
                    recorded=branches[score.cell],
                    max_branches=self.rules.max_branches,
                )
                for score in played
            ]
        if self.is_warning:
            for line in (*recording_limit_warnings(complete), *probe_warnings(probes)):
                log.warning("%s", line)
        return complete

    def _batches(
        self,
        judge: Judge,
        graded: dict[Cell, QuestionGrading],
        branches: dict[Cell, list[int]],
        probes: dict[Cell, str],
    ) -> Iterator[RecordingBatch]:
        """Yield one batch per cell, read on demand.

        Its grading is added to `graded`, its branch counts to `branches`, and problems with its probes to `probes`.
        """
        is_probing = any(spec.needs_probes for spec in self.specs)
        is_warning = self.is_warning and not self.is_read
        for cell, (recorded, selected) in each_scorable(
            self.cells, lambda cell: read_scorable(self.source, cell, self.weights, self.version, is_warning)
        ):
            weights = [_weight(item, self.weights) for item in recorded]
            answers = self.answers.resolve(recorded)
            graded[cell] = QuestionGrading([item.label_source for item in recorded], weights, answers, selected)
            recordings = [intern_compared(item, answers, judge) for item in recorded]
            self.anchors[cell] = chain_anchor(recordings)
            branches[cell] = [recording.branches for recording in recordings]
            if is_probing:
                probes[cell] = probe_problem(recordings, self.rules.probe_tokens)
            most = min(branches[cell])
            for spec in self.specs:
                if spec.chains > min(most, self.rules.max_branches):
                    raise RecordingsNotFound(
                        f"{spec.name} opens {spec.chains} branches, but {' '.join(cell)} has {most} per question "
                        f"and --max-branches is {self.rules.max_branches}"
                    )
                if spec.needs_probes and not all(recording.has_probes for recording in recordings):
                    raise RecordingsNotFound(
                        f"{spec.name} probes, and the branches of {' '.join(cell)} are whole replies, which have no "
                        "probes; leave the controller or the cell out"
                    )
            yield RecordingBatch(recordings, make_jobs(self.specs, self.betas, cell, self.shuffles))


FREE_PROBES: Final = "no probe tokens are recorded, so probes cost nothing; --probe-tokens charges them"
EMPTY_PROBES: Final = "no recorded probe has an answer, so controllers that probe learn nothing by it"


def probe_problem(recordings: Sequence[Recording], probe_tokens: int | None) -> str:
    """Return why figures of controllers that probe mislead on the recordings of a cell; empty if they do not."""
    probed = [recording for recording in recordings if recording.has_probes and recording.probes.size]
    if probed and all((recording.probes == NO_ANSWER).all() for recording in probed):
        return EMPTY_PROBES
    is_free = probe_tokens is None and not any(recording.has_probe_costs for recording in probed)
    return FREE_PROBES if probed and is_free else ""


def probe_warnings(problems: Mapping[Cell, str]) -> list[str]:
    """Return a line on each problem with probes, which names the first of its cells."""
    lines = []
    for problem in dict.fromkeys(filter(None, problems.values())):
        first, *others = [" ".join(cell) for cell, own in problems.items() if own == problem]
        more = f" and {len(others)} more cell{'s' if len(others) > 1 else ''}" if others else ""
        lines.append(f"{first}{more}: {problem}")
    return lines


def each_scorable(cells: Sequence[Cell], read: Callable[[Cell], T]) -> Iterator[tuple[Cell, T]]:
    """Yield each cell with what is read of it. Cells of which nothing can be scored are left out with a warning.

    A store of a running proxy has such cells: requests whose right answers nobody knows. Raises RecordingsNotFound if
    nothing of any cell can be scored.
    """
    reasons: list[RecordingsNotFound] = []
    for cell in cells:
        try:
            content = read(cell)
        except RecordingsNotFound as error:
            reasons.append(error)
            continue
        yield cell, content
    if len(reasons) == len(cells) and reasons:
        raise reasons[0]
    for reason in reasons:
        log.warning("left out: %s", reason)


def read_scorable_cell(
    source: RecordingSource, cell: Cell, answers: AnswerComparison, judge: Judge | None = None
) -> tuple[list[Recording], AnswerComparison]:
    """Return the recordings of a cell that are scored by default, and how their answers are compared.

    Raises RecordingsNotFound.
    """
    scored = scorable_recordings(source, cell)
    answers = answers.resolve(scored)
    return [intern_compared(recorded, answers, judge) for recorded in scored], answers


def scorable_recordings(
    source: RecordingSource, cell: Cell, weights: Weights = DEFAULT_WEIGHTS, version: str = ""
) -> list[RecordedQuestion]:
    """Return the recordings of `read_scorable`. Raises RecordingsNotFound."""
    return read_scorable(source, cell, weights, version).recordings


class ScorableCell(NamedTuple):
    """Recordings of a cell that are scored, and the questions left out."""

    recordings: list[RecordedQuestion]
    selected: SelectedByOutcome


def read_scorable(
    source: RecordingSource, cell: Cell, weights: Weights = DEFAULT_WEIGHTS, version: str = "", is_warning: bool = True
) -> ScorableCell:
    """Return the complete recordings of a cell with a reference that counts, all of one version, one per question.

    If clients judged questions of the cell wrong whose right answer is unknown, only `unselected_sources` count.

    If `version` is empty and there are several versions made here, the one chosen was made with the latest upstream and
    has the most common sampling. What is left out is logged, and with `is_warning` also that feedback biases labels.
    Raises RecordingsNotFound.
    """
    recorded = source.load(cell)
    graded, selected = _graded(cell, recorded, weights)
    kept = _of_one_version(cell, graded, version)
    made_here = [item for item in recorded if item.origin is not Origin.IMPORTED]
    if not version and made_here and not any(item.version.upstream == made_here[-1].version.upstream for item in kept):
        log.warning(
            "%s: no recording of the newest version, %s, can be scored", " ".join(cell), made_here[-1].version.digest
        )
    if is_warning and any(item.label_source is LabelSource.FEEDBACK for item in kept):
        log.warning("%s: right answers are known by feedback: %s", " ".join(cell), UNEVEN_FEEDBACK)
    return ScorableCell(pool_recordings(kept), selected)


def pool_recordings(recorded: Sequence[RecordedQuestion]) -> list[RecordedQuestion]:
    """Merge recordings of the same question, version and reference, in order of first appearance.

    Complete recordings are merged separately from incomplete ones. All branches of one version are samples of the same
    distribution, whatever requests they were made for. At temperature 0, one greedy branch is kept, as the first.
    """
    groups: dict[object, list[RecordedQuestion]] = {}
    for item in recorded:
        key = item.question, item.version, item.complete, item.reference, item.label_source
        groups.setdefault(key, []).append(item)
    return [
        group[0] if len(group) == 1 else replace(group[0], branches=pooled_branches(group)) for group in groups.values()
    ]


def intern_compared(recorded: RecordedQuestion, answers: AnswerComparison, judge: Judge | None) -> Recording:
    """Return the recording that replay runs, with answers numbered as `answers` compares them; it is not `AUTO`."""
    return intern_answers(recorded) if answers is AnswerComparison.EXACT else regrade(recorded, judge)


def regrade(recorded: RecordedQuestion, judge: Judge | None = None) -> Recording:
    """Return the recording with answers read as the proxy reads them; unreadable answers count as none."""
    labels = Labels(judge)

    def label(answer: str) -> int | None:
        form = canonical(answer)
        return None if form is None else labels.label_of(form, answer)

    return intern_answers(recorded, label)


def _report_progress(
    outcomes: Iterator[tuple[Job, JobResult]], on_progress: Callable[[int], None]
) -> Iterator[tuple[Job, JobResult]]:
    for job, played in outcomes:
        on_progress(len(job.shuffles))
        yield job, played


def _weight(recorded: RecordedQuestion, weights: Weights) -> float:
    """Return the weight of a recording; 0 if it is left out."""
    weight = weights.get(recorded.label_source, 0.0)
    return recorded.confidence if weight is None else weight


def _graded(
    cell: Cell, recorded: Sequence[RecordedQuestion], weights: Weights
) -> tuple[list[RecordedQuestion], SelectedByOutcome]:
    """Return the complete recordings whose reference answer counts, and what is left out as chosen by its outcome.

    Raises RecordingsNotFound.
    """
    name = " ".join(cell)
    known = [item for item in recorded if item.complete and item.reference is not None]
    if not known:
        raise RecordingsNotFound(f"{name}: none of {len(recorded)} recordings is complete and has a reference answer")
    unknown = (item for item in recorded if item.reference is None or _weight(item, weights) <= 0)
    judged_wrong = len({item.question for item in unknown if item.complete and item.judged_wrong})
    counted = unselected_sources(judged_wrong)
    would_count = [item for item in known if _weight(item, weights) > 0]
    chosen = {item.question: item.label_source for item in would_count if item.label_source not in counted}
    selected = SelectedByOutcome(judged_wrong, Counter(chosen.values()))
    if chosen:
        why = f"{name}: questions judged wrong whose right answer is unknown: {judged_wrong:,}; {SELECTED_BY_OUTCOME}"
        known = [item for item in known if item.label_source in counted]
        if not known:
            raise RecordingsNotFound(why)
        log.warning("%s", why)
    kept = [item for item in known if _weight(item, weights) > 0]
    omitted = Counter(item.label_source for item in known if _weight(item, weights) <= 0)
    others = " and ".join(f"{omitted[source]} by {source}" for source in LabelSource if omitted[source])
    if not kept:
        way = (
            f"`autotts evaluate --labels {','.join(source for source in LabelSource if omitted[source])}` includes them"
        )
        raise RecordingsNotFound(
            f"{name}: the only reference answers are {others}, which do not count by default; {way}"
        )
    if others:
        log.warning("%s: recordings were left out because of how their reference answers are known: %s", name, others)
    return kept, selected


def _of_one_version(cell: Cell, kept: Sequence[RecordedQuestion], wanted: str) -> list[RecordedQuestion]:
    """Return the recordings of one version, chosen as `scorable_recordings` describes.

    `wanted` is the beginning of the version's digest, or empty. Raises RecordingsNotFound.
    """
    name = " ".join(cell)
    by_version: dict[Version, list[RecordedQuestion]] = {}
    for item in kept:
        by_version.setdefault(item.version, []).append(item)
    if wanted:
        matching = [version for version in by_version if version.digest.startswith(wanted)]
        if len(matching) != 1:
            count = len(matching)
            problem = f"{count} versions begin with {wanted!r}" if count else f"no version {wanted!r} can be scored"
            raise RecordingsNotFound(f"{name}: {problem}; versions: {_listed(by_version)}")
        return by_version[matching[0]]
    if len(by_version) == 1:
        return list(kept)
    if any(item.origin is Origin.IMPORTED for item in kept):
        raise RecordingsNotFound(
            f"{name}: recordings of {len(by_version)} versions cannot be scored together: {_listed(by_version)}; "
            "choose one with `autotts evaluate --version`"
        )
    latest = kept[-1].version.upstream
    current = [group for group in by_version.values() if group[0].version.upstream == latest]
    newest = max(reversed(current), key=len)
    del by_version[newest[0].version]
    log.warning(
        "%s: version %s is scored; left out: %s",
        name,
        newest[0].version.digest,
        _listed({newest[0].version: newest, **by_version}, skip=1),
    )
    return newest


def _listed(by_version: Mapping[Version, Sequence[RecordedQuestion]], skip: int = 0) -> str:
    """List versions except the first `skip`: digest, number of recordings, and the fields that differ among all
    versions.
    """
    differ = [field for field in Version._fields if len({getattr(version, field) for version in by_version}) > 1]
    items = []
    for version, recorded in list(by_version.items())[skip:]:
        about = ", ".join(f"{field.replace('_', ' ')} {getattr(version, field) or 'unknown'}" for field in differ)
        items.append(f"{version.digest} ({len(recorded)}{': ' if about else ''}{about})")
    return "; ".join(items)
