"""`autotts collect`: complete recordings of a model's branches, through the running proxy."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from discovery.answers import parse_kind
from discovery.commands.console import wide_console
from discovery.data.atomic_files import check_writable_path
from discovery.data.questions import read_questions
from discovery.errors import CollectError

if TYPE_CHECKING:
    from discovery.data.collect import CollectionProgress

T = TypeVar("T")

SKIPPED: Final = 1
"""Exit status when branches were given up."""
INTERRUPTED: Final = 130
MILLION: Final = 1_000_000


def collecting(
    questions: Annotated[Path, typer.Argument(help="one JSON object a line: a question and what is known of it")],
    out: Annotated[Path, typer.Option(help="where branches go, a line each (.jsonl)")],
    branches: Annotated[int, typer.Option(min=1, max=1024, help="branches of each question")] = 64,
    url: Annotated[str, typer.Option(help="the proxy's address")] = "http://127.0.0.1:8400",
    model: Annotated[str, typer.Option(help="without it the only one the proxy serves")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is in --out")] = False,
    max_tokens_total: Annotated[
        int | None, typer.Option(min=1, help="tokens that all branches in --out of this model and settings may cost")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of a branch; without it as many as the model can have in view")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=1024, help="branches that are made at a time")] = 8,
    benchmark: Annotated[str, typer.Option(help="what the questions belong to; without it their file's name")] = "",
    answer: Annotated[str, typer.Option(help="how answers are read, as tts.answer says it")] = "auto",
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="without it the model's own")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="without it the model's own")] = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="write questions down, not their hashes only")] = False,
    usd_per_million: Annotated[float | None, typer.Option(min=0, help="what a million tokens cost")] = None,
) -> None:
    """Record branches of questions, each run to its end and asked after every interval.

    The proxy's admin key is taken from AUTOTTS_ADMIN_KEY.
    """
    from discovery.data.collect import collect  # imports `openai`, which takes a while
    from discovery.data.collection_client import ADMIN_KEY_VARIABLE
    from discovery.data.collection_plan import CollectionPlan

    if 0 in (temperature, top_p):
        raise typer.BadParameter("--temperature, --top-p: at 0 all branches are the same; name more, or neither")
    if out.suffix != ".jsonl":
        raise typer.BadParameter(f"--out {out}: end it in .jsonl, by which recordings are known")
    parse_kind(answer)
    check_writable_path(out, "--out")
    if not resume and out.exists() and out.stat().st_size:
        raise CollectError(f"--out {out}: there are recordings in it; --resume goes on with them")
    asked = read_questions(questions)
    key = os.environ.get(ADMIN_KEY_VARIABLE, "")
    if not (key and key.isascii() and key.isprintable()):
        wrong = "has characters that no header can carry" if key else "is not set"
        raise CollectError(
            f"{ADMIN_KEY_VARIABLE} {wrong}: recording is for admins, by the key the proxy was started with"
        )
    order = CollectionPlan(
        model, benchmark or questions.stem, branches, answer, temperature, top_p, max_tokens, keep_text
    )
    with CollectProgress(usd_per_million) as shown:
        work = collect(url, key, asked, order, out, at_once, max_tokens_total, on_change=shown.change)
        try:
            at = asyncio.run(_interruptible(work))
        except (KeyboardInterrupt, asyncio.CancelledError):
            at = None
    say = partial(wide_console().print, highlight=False, markup=False, soft_wrap=True)
    if at is None:
        say(f"{out}: interrupted; what was finished is in it, and --resume goes on")
        raise typer.Exit(INTERRUPTED)
    words = f"{out}: {at.done:,} of {at.total:,} branches, {at.mine:,} of them now"
    say(f"{words}; {_spent(at, usd_per_million)}")
    if at.is_out_of_budget:
        say(
            f"stopped: {at.spent:,} tokens are spent, and one more branch, which may cost {at.reserve:,}, "
            f"might pass {max_tokens_total:,}; --resume with a larger --max-tokens-total goes on"
            + ("" if at.done else ", and --max-tokens bounds a branch")
        )
    for one in at.skipped:
        say(f"given up: {' '.join(one.split())}", style="red")
    if at.skipped:
        say("--resume tries again")
        raise typer.Exit(SKIPPED)


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """The same work, which SIGTERM ends as orderly as an interrupt does."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _spent(at: CollectionProgress, usd_per_million: float | None) -> str:
    """What this process has spent, in words."""
    usd = "" if usd_per_million is None else f", ${at.tokens / MILLION * usd_per_million:,.2f}"
    return f"{at.tokens:,} tokens in {at.seconds:,.0f} s ({at.tokens / max(at.seconds, 1e-3):,.0f}/s){usd}"


class CollectProgress:
    """How far it is; on a terminal a bar."""

    def __init__(self, usd_per_million: float | None, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        words = (TextColumn("branches"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*words, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._before = 0  # branches that were there when it began, which tell nothing of how fast it goes
        self._usd_per_million = usd_per_million

    def __enter__(self) -> CollectProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def change(self, at: CollectionProgress) -> None:
        """Take notice of how far it is."""
        if self._task is None:
            self._task, self._before = self._progress.add_task("", total=at.total), at.done
        words = _spent(at, self._usd_per_million)
        if made := at.done - self._before:
            words += f", {timedelta(seconds=round(at.seconds / made * (at.total - at.done)))} left"
        self._progress.update(self._task, description=words, completed=at.done)
