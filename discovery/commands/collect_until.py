"""`autotts collect --until-decided`: collect held-out questions in batches until a sequential judgement decides."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Final

from controllers.loading import parse_spec
from discovery.commands.gate import judge_in_subprocess
from discovery.commands.options import user_name
from discovery.data.questions import Question
from discovery.data.recordings import Split, default_split
from discovery.errors import CollectError
from discovery.promotion.conditions import HELD_OUT
from discovery.promotion.gate import GateJob
from discovery.promotion.power_plan import ORDERS
from discovery.promotion.sequential_gate import AXIS_QUESTIONS
from discovery.promotion.verdict import GateReport
from discovery.store import StorePlace
from discovery.store.records import utc_now

if TYPE_CHECKING:
    from discovery.data.collect import CollectionProgress

FIRST_BATCH: Final = 2 * AXIS_QUESTIONS
"""Questions collected before the first look."""
GROWTH: Final = 1.25
"""Factor by which the number of questions grows between looks: each look replays all questions so far."""


@dataclass(frozen=True)
class SequentialJob:
    """The judgement that decides when a collection ends."""

    finalist: str  # NAME, NAME@N or FILE.py
    champion: str
    ledger: StorePlace
    recordings: Path  # that are being collected
    model: str  # empty: the only one in the recordings
    benchmark: str
    probe_tokens: int | None = None  # tokens charged per probe; None: as recorded

    def check(self, branches: int) -> None:
        """Raise an error, before anything is spent, if a controller is unknown or needs more branches."""
        for text in (self.finalist, self.champion):
            chains = parse_spec(text).chains
            if chains > branches:
                raise CollectError(f"{text} opens {chains} branches; --branches {branches} is too few to judge it")

    def look(self) -> GateReport:
        """Judge what has been collected so far. Raises GateError."""
        with tempfile.TemporaryDirectory(prefix="autotts-") as folder:
            job = GateJob(
                finalist=self.finalist,
                champion=self.champion,
                recordings=self.recordings,
                ledger=self.ledger,
                report=Path(folder, "report.json"),
                created=utc_now(),
                who=user_name(),
                models=self.model,
                benchmarks=self.benchmark,
                shuffles=ORDERS,
                probe_tokens=self.probe_tokens,
                sequential=True,
            )
            return judge_in_subprocess(job)


def judgeable_questions(questions: Sequence[Question]) -> list[Question]:
    """Return the held-out questions that have a reference answer, in the order in which they are tested.

    Raises CollectError if they are too few for a look.
    """
    held_out = [
        question
        for question in questions
        if (question.split or default_split(question.question)) is Split.HELD_OUT and question.reference is not None
    ]
    if len(held_out) <= AXIS_QUESTIONS:
        raise CollectError(
            f"{len(held_out)} of {len(questions)} questions are held-out and have a reference answer; --until-decided "
            f'needs more than {AXIS_QUESTIONS}; add questions, or mark new ones with "split": "held-out"'
        )
    return sorted(held_out, key=lambda question: question.question)


def batch_ends(questions: int) -> Iterator[int]:
    """Yield how many of the questions are collected before each look."""
    end = FIRST_BATCH
    while end < questions:
        yield end
        end = round(end * GROWTH)
    yield questions


async def collect_until_decided(
    collect_all: Callable[[Sequence[Question]], Awaitable[CollectionProgress]],
    look: Callable[[], GateReport],
    questions: Sequence[Question],
    on_look: Callable[[GateReport], None] = lambda _: None,
) -> tuple[CollectionProgress, GateReport]:
    """Collect more and more of the questions, and look after each batch, until the verdict is no longer `undecided`.

    `collect_all` records the given questions as far as they are not recorded. It also ends when more questions cannot
    decide, the token budget is spent, or there are no more questions. Raises the errors of both functions.
    """
    runs: list[CollectionProgress] = []
    for end in batch_ends(len(questions)):
        runs.append(await collect_all(questions[:end]))
        report = await asyncio.to_thread(look)
        on_look(report)
        if not report.can_grow or runs[-1].is_out_of_budget:
            break
    return reduce(_add, runs), report


def _add(before: CollectionProgress, after: CollectionProgress) -> CollectionProgress:
    """Return the progress of two runs after one another."""
    return replace(
        after,
        mine=before.mine + after.mine,
        tokens=before.tokens + after.tokens,
        seconds=before.seconds + after.seconds,
        without_signals=before.without_signals + after.without_signals,
    )


def describe_look(report: GateReport) -> str:
    """Return a look as one line."""
    text = f"{report.questions} questions tested: {report.verdict}, ΔAFS {report.delta_afs:+.2f}, p = {report.p:.3g}"
    text += f" ({report.alpha:.3g} needed)"
    if report.more is not None:
        text += f"; about {report.more:,} more would end it if they are like these"
    for condition in report.failed:
        if condition.name == HELD_OUT:
            text += f"; this sequence cannot promote: {condition.words}, without --until-decided"
    return text
