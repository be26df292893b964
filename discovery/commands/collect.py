"""`autotts collect`: record complete branches of a model through the running proxy."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from controllers.builtin import DEFAULT
from discovery.answers import parse_kind
from discovery.commands.collect_until import (
    SequentialJob,
    collect_until_decided,
    describe_look,
    judgeable_questions,
)
from discovery.commands.console import wide_console
from discovery.commands.options import Address, LedgerPlace, check_cluster_options
from discovery.data.atomic_files import check_writable_path
from discovery.data.questions import Question, collected_kind, read_questions
from discovery.errors import CollectError
from discovery.exit_signals import run_interruptibly
from discovery.promotion.ledger import check_ledger
from discovery.store import StorePlace
from discovery.worker_pool import cores

if TYPE_CHECKING:
    from discovery.data.collect import CollectionProgress
    from discovery.data.collection_client import Send
    from discovery.data.collection_plan import CollectionPlan
    from discovery.promotion.verdict import GateReport

SKIPPED: Final = 1
"""Exit status if branches were skipped after errors."""
INTERRUPTED: Final = 130
MILLION: Final = 1_000_000


class CollectEngine(StrEnum):
    """Values of `--engine` of `autotts collect`."""

    LOCAL = "local"
    RAY = "ray"


def collect_command(
    questions: Annotated[
        Path, typer.Argument(help="file of JSON lines: a question and optionally its reference answer")
    ],
    out: Annotated[Path, typer.Option(help="file to write branches to, one per line (.jsonl)")],
    branches: Annotated[int, typer.Option(min=1, max=1024, help="branches per question")] = 64,
    url: Annotated[str, typer.Option(help="URL of the proxy")] = "http://127.0.0.1:8400",
    model: Annotated[str, typer.Option(help="model to record (default: the only one the proxy serves)")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="continue the recordings in --out")] = False,
    max_tokens_total: Annotated[
        int | None, typer.Option(min=1, help="token budget for all branches in --out of this model and settings")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="maximum tokens per branch (default: the model's context length)")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=1024, help="branches generated concurrently")] = 64,
    benchmark: Annotated[str, typer.Option(help="benchmark of the questions (default: the file's name)")] = "",
    answer: Annotated[str, typer.Option(help="how answers are extracted, as in tts.answer")] = "auto",
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="default: the model's own")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="default: the model's own")] = None,
    keep_text: Annotated[
        bool, typer.Option("--keep-text", help="record the questions' texts, not only their hashes")
    ] = False,
    signals: Annotated[
        bool, typer.Option("--signals", help="record how confident the model was of each interval and probe")
    ] = False,
    usd_per_million: Annotated[
        float | None, typer.Option(min=0, help="price of a million tokens in USD, to print the cost")
    ] = None,
    until_decided: Annotated[
        bool,
        typer.Option(
            "--until-decided", help="collect held-out questions only, until the sequential gate has a verdict"
        ),
    ] = False,
    finalist: Annotated[str, typer.Option(help="for --until-decided: controller to judge, FILE.py or a name")] = "",
    champion: Annotated[str, typer.Option(help="for --until-decided: champion to beat")] = DEFAULT,
    ledger: LedgerPlace = None,
    probe_tokens: Annotated[
        int | None, typer.Option(min=0, help="for --until-decided: tokens charged per probe (default: as recorded)")
    ] = None,
    engine: Annotated[
        CollectEngine, typer.Option(help="where requests are sent from: this process, or workers of a Ray cluster")
    ] = CollectEngine.LOCAL,
    workers: Annotated[
        int | None, typer.Option(min=1, help="workers for --engine ray without --address (default: one per core)")
    ] = None,
    address: Address = None,
) -> None:
    """Record branches of questions, each run to its end and then probed after every interval.

    The proxy's admin key is read from AUTOTTS_ADMIN_KEY.
    """
    from discovery.data.collect import BRANCHES_PER_REQUEST, collect  # imports `openai`, which takes a while
    from discovery.data.collection_client import ADMIN_KEY_VARIABLE
    from discovery.data.collection_plan import REPLY_KINDS, CollectionPlan

    check_cluster_options(engine, address, workers)
    if 0 in (temperature, top_p):
        raise typer.BadParameter(
            "--temperature, --top-p: at 0 all branches are identical; use larger values, or neither option"
        )
    if out.suffix != ".jsonl":
        raise typer.BadParameter(f"--out {out}: the name of a recordings file must end in .jsonl")
    parse_kind(answer)
    check_writable_path(out, "--out")
    if not resume and out.exists() and out.stat().st_size:
        raise CollectError(f"--out {out}: the file holds recordings; continue them with --resume, or name another file")
    question_list = read_questions(questions)
    answer = collected_kind(question_list, answer)
    if signals and answer in REPLY_KINDS:
        raise CollectError(f"--signals: the questions ask for {answer}, whose branches have no signals; leave it out")
    key = os.environ.get(ADMIN_KEY_VARIABLE, "")
    if not (key and key.isascii() and key.isprintable()):
        wrong = "has characters that are not allowed in an HTTP header" if key else "is not set"
        raise CollectError(
            f"{ADMIN_KEY_VARIABLE} {wrong}: recording needs the admin key that the proxy was started with"
        )
    plan = CollectionPlan(
        model, benchmark or questions.stem, branches, answer, temperature, top_p, max_tokens, keep_text, signals
    )
    print_line = partial(wide_console().print, highlight=False, markup=False, soft_wrap=True)
    judgement = _judgement(until_decided, finalist, champion, ledger, probe_tokens, max_tokens_total, plan, out)
    with (
        _senders(engine, address, workers, -(-at_once // BRANCHES_PER_REQUEST), url, key) as send,
        CollectionProgressBar(usd_per_million) as bar,
    ):

        def collect_all(of_questions: Sequence[Question]) -> Coroutine[Any, Any, CollectionProgress]:
            return collect(
                url, key, of_questions, plan, out, at_once, max_tokens_total, on_change=bar.update, send=send
            )

        work = (
            collect_all(question_list)
            if judgement is None
            else _collect_judged(collect_all, judgement, judgeable_questions(question_list), print_line)
        )
        try:
            progress = asyncio.run(run_interruptibly(work))
        except (KeyboardInterrupt, asyncio.CancelledError):
            progress = None
    if progress is None:
        print_line(f"{out}: interrupted; finished branches are saved, continue with --resume")
        raise typer.Exit(INTERRUPTED)
    summary = f"{out}: {progress.done:,} of {progress.total:,} branches, {progress.mine:,} of them in this run"
    print_line(f"{summary}; {_spent(progress, usd_per_million)}")
    if progress.is_out_of_budget:
        print_line(
            f"stopped: {progress.spent:,} tokens are spent, and one more branch may cost {progress.reserve:,}, which "
            f"could exceed {max_tokens_total:,}; continue with --resume and a larger --max-tokens-total"
            + ("" if progress.done else ", or limit branches with --max-tokens")
        )
    if progress.without_signals:
        print_line(
            f"{progress.without_signals:,} branches have no signals, because the upstream sends no log-probabilities",
            style="red",
        )
    for error in progress.skipped:
        print_line(f"skipped: {' '.join(error.split())}", style="red")
    if progress.skipped:
        print_line("retry them with --resume")
        raise typer.Exit(SKIPPED)


@contextmanager
def _senders(
    engine: CollectEngine, address: str | None, workers: int | None, most: int, url: str, key: str
) -> Iterator[Send | None]:
    """Yield the function that sends requests from up to `most` workers of Ray, or None to send them from here."""
    if engine is CollectEngine.LOCAL:
        yield None
        return
    from discovery.data.ray_senders import ray_senders

    with ray_senders(address, workers or cores(), most, url, key) as send:
        yield send


def _judgement(
    until_decided: bool,
    finalist: str,
    champion: str,
    ledger: StorePlace | None,
    probe_tokens: int | None,
    budget: int | None,
    plan: CollectionPlan,
    out: Path,
) -> SequentialJob | None:
    """Return the judgement that ends the collection, if one does. Raises BadParameter if an option is missing."""
    if not until_decided:
        if finalist or ledger is not None or probe_tokens is not None:
            raise typer.BadParameter("--finalist, --ledger and --probe-tokens are for --until-decided")
        return None
    if not finalist or ledger is None or budget is None:
        raise typer.BadParameter("--until-decided needs --finalist, --ledger and --max-tokens-total")
    check_ledger(ledger)
    job = SequentialJob(finalist, champion, ledger, out, plan.model, plan.benchmark, probe_tokens)
    job.check(plan.branches)
    return job


async def _collect_judged(
    collect_all: Callable[[Sequence[Question]], Coroutine[Any, Any, CollectionProgress]],
    judgement: SequentialJob,
    questions: Sequence[Question],
    print_line: Callable[[str], None],
) -> CollectionProgress:
    def on_look(report: GateReport) -> None:
        print_line(describe_look(report))

    progress, report = await collect_until_decided(collect_all, judgement.look, questions, on_look)
    print_line(f"{report.name} against {report.champion}: {report.verdict}")
    return progress


def _spent(progress: CollectionProgress, usd_per_million: float | None) -> str:
    """Return what this process has spent: tokens, seconds, tokens per second and USD if a price is given."""
    usd = "" if usd_per_million is None else f", ${progress.tokens / MILLION * usd_per_million:,.2f}"
    rate = progress.tokens / max(progress.seconds, 1e-3)
    return f"{progress.tokens:,} tokens in {progress.seconds:,.0f} s ({rate:,.0f}/s){usd}"


class CollectionProgressBar:
    """Progress bar of a collection; shown on a terminal only."""

    def __init__(self, usd_per_million: float | None, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        columns = (TextColumn("branches"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._before = 0  # branches done before this run, which do not count towards its speed
        self._usd_per_million = usd_per_million

    def __enter__(self) -> CollectionProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, progress: CollectionProgress) -> None:
        """Show the current state."""
        if self._task is None:
            self._task, self._before = self._progress.add_task("", total=progress.total), progress.done
        description = _spent(progress, self._usd_per_million)
        if made := progress.done - self._before:
            description += (
                f", {timedelta(seconds=round(progress.seconds / made * (progress.total - progress.done)))} left"
            )
        self._progress.update(self._task, description=description, completed=progress.done, total=progress.total)
