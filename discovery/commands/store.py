"""`autotts import` and `autotts store`: recordings in and out of the replay store."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from discovery.commands.console import names, wide_console
from discovery.data.atomic_files import atomic_write, check_writable_path
from discovery.data.importers import format_recording_line, read_jsonl, read_release, release_files
from discovery.data.recordings import Origin, RecordedQuestion, Split, default_split
from discovery.errors import RecordingsNotFound, StoreError
from discovery.evaluation.sources import open_source, select_cells
from discovery.store import CellSummary, ServedSummary, Store

T = TypeVar("T")

CORRUPT = 1
"""Exit status of a store that is not what was written."""

importing = typer.Typer(name="import", no_args_is_help=True, help="Take recordings into a replay store.")
store = typer.Typer(name="store", no_args_is_help=True, help="Look at a replay store, and keep it.")

Place = Annotated[Path, typer.Option("--store", envvar="AUTOTTS_STORE", help="the store's file")]
DEFAULT = Path("autotts.db")
AsJson = Annotated[bool, typer.Option("--json", help="as JSON")]
Request = Annotated[str, typer.Option("--request-id", help="all that came of this request")]
Tenant = Annotated[str, typer.Option(help="all that came of this tenant's requests, by its hash")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="all that came of requests without a key")]


class SplitBy(StrEnum):
    """Where imported questions go."""

    SEARCH = "search"
    VALIDATION = "validation"
    HELD_OUT = "held-out"
    HASH = "hash"  # by the question's hash


@importing.command("autotts-release")
def import_release(
    paths: Annotated[list[Path], typer.Argument(help="files MODEL/BENCHMARK.json[.xz], or folders of them")],
    place: Place = DEFAULT,
    split: Annotated[SplitBy | None, typer.Option(help="without it as the release has them: aime24 is search")] = None,
) -> None:
    """The public release of the AutoTTS paper."""
    files = [file for path in paths for file in release_files(path)]
    _import(files, read_release, place, split)


@importing.command("jsonl")
def import_jsonl(
    paths: Annotated[list[Path], typer.Argument(help="files of one JSON object a line, plain or .xz")],
    place: Place = DEFAULT,
    split: Annotated[SplitBy | None, typer.Option(help="without it as each line says, else by hash")] = None,
) -> None:
    """The generic format, described in docs/evaluation.md."""
    _import(paths, read_jsonl, place, split)


def _import(
    files: Sequence[Path],
    read: Callable[[Path], list[RecordedQuestion]],
    place: Path,
    split: SplitBy | None,
) -> None:
    """Read every file, then write all or nothing."""
    console = Console(stderr=True)
    shown = track(files, "reading", console=console, transient=True, disable=not console.is_terminal)
    recordings = [_put(recorded, split) for file in shown for recorded in read(file)]
    added = with_store(place, lambda opened: opened.add(recordings), create=True)
    known = len(recordings) - added.recordings
    wide_console().print(
        f"{place}: {added.recordings} recordings of {added.questions} new questions, {added.branches} branches added; "
        f"{known} were there already",
        highlight=False,
    )


def _put(recorded: RecordedQuestion, split: SplitBy | None) -> RecordedQuestion:
    if split is None:
        return recorded
    return replace(recorded, split=default_split(recorded.question) if split is SplitBy.HASH else Split(split))


def with_store(place: Path, work: Callable[[Store], Awaitable[T]], create: bool = False) -> T:
    """What `work` gives of the store at `place`."""

    async def run() -> T:
        async with Store.open(place, create=create) as opened:
            return await work(opened)

    return asyncio.run(run())


@store.command()
def info(place: Place = DEFAULT, as_json: AsJson = False) -> None:
    """Show the recordings by model, benchmark and split, the served requests and the feedback on them."""

    async def look(opened: Store) -> tuple[list[CellSummary], ServedSummary]:
        return await opened.summaries(), await opened.served()

    cells, served = with_store(place, look)
    if as_json:
        figures = [one.cell._asdict() | dict(zip(one._fields[1:], one[1:], strict=True)) for one in cells]
        sys.stdout.write(json.dumps({"cells": figures, **served._asdict()}, indent=2) + "\n")
        return
    table = Table(title=str(place), title_justify="left")
    for heading in ("model", "benchmark", "split", "questions", "recordings", "complete", "branches"):
        table.add_column(heading, justify="left" if heading in ("model", "benchmark", "split") else "right")
    for one in cells:
        table.add_row(*one.cell, *(f"{figure:,}" for figure in one[1:]))
    console = wide_console()
    console.print(table)
    console.print(_requests(served), highlight=False, markup=False)


def _requests(served: ServedSummary) -> str:
    if not served.episodes:
        return "served requests: none"
    stops = ", ".join(f"{stop}: {count:,}" for stop, count in served.stops.items())
    told = ", ".join(f"{kind}: {count:,}" for kind, count in served.feedback.items()) or "none"
    when = f"from {str(served.oldest)[:19]} to {str(served.newest)[:19]} UTC"
    return f"served requests: {served.episodes:,} {when} ({stops})\nfeedback: {told}"


@store.command()
def verify(place: Place = DEFAULT, as_json: AsJson = False) -> None:
    """Whether every row is what was written; exit status 1 if one is not."""
    found = with_store(place, Store.verify)
    if as_json:
        sys.stdout.write(json.dumps({"rows": dict(found.rows), "bad": list(found.bad)}, indent=2) + "\n")
    else:
        console = wide_console()
        counts = ", ".join(f"{count:,} {table}" for table, count in found.rows.items())
        console.print(f"{place}: {counts}; {len(found.bad)} rows are bad", highlight=False)
        for one in found.bad:
            console.print(one, style="red", highlight=False, markup=False)
    if found.bad:
        raise typer.Exit(CORRUPT)


@store.command()
def export(
    to: Annotated[Path, typer.Argument(help="file to write, in the generic format")],
    place: Place = DEFAULT,
    models: Annotated[str, typer.Option(help="which models; without it all")] = "",
    benchmarks: Annotated[str, typer.Option(help="which benchmarks; without it all")] = "",
    split: Annotated[Split | None, typer.Option(help="which questions; without it all")] = None,
) -> None:
    """Recordings as a file that `autotts import jsonl` reads."""
    check_writable_path(to, "export")
    source = open_source(place)
    cells = select_cells(source.cells(), names(models), names(benchmarks), split)
    count = 0
    with atomic_write(to, private=True) as file:
        for cell in cells:
            for recorded in source.load(cell):
                file.write(format_recording_line(recorded).encode())
                count += 1
    wide_console().print(f"{to}: {count} recordings", highlight=False)


def forget(request: Request = "", tenant: Tenant = "", anonymous: Anonymous = False, place: Place = DEFAULT) -> None:
    """Remove what came of a request, or of a tenant's, for good: its bytes go too, and it cannot come back."""
    if (bool(request), bool(tenant), anonymous).count(True) != 1:
        raise StoreError("forget: say --request-id ID, --tenant HASH or --anonymous, one of them")
    gone = with_store(place, lambda opened: opened.forget(request=request or None, tenant=None if request else tenant))
    if not any(gone):
        raise RecordingsNotFound(f"{place}: holds nothing of {request or tenant or 'requests without a key'}")
    wide_console().print(
        f"{place}: forgot {gone.episodes} episodes, {gone.feedback} of feedback, {gone.recordings} recordings, "
        f"{gone.labels} labels, and {gone.questions} questions nothing else is known of",
        highlight=False,
    )


@store.command()
def prune(
    place: Place = DEFAULT,
    models: Annotated[str, typer.Option(help="drop recordings of these models")] = "",
    benchmarks: Annotated[str, typer.Option(help="drop recordings of these benchmarks")] = "",
    origin: Annotated[Origin | None, typer.Option(help="drop recordings that came this way")] = None,
    corrupt: Annotated[bool, typer.Option("--corrupt", help="drop what is not what was written")] = False,
) -> None:
    """Drop recordings: those that meet all that is said of them, and with --corrupt those that are spoilt."""
    by_model, by_benchmark = names(models), names(benchmarks)
    if not (by_model or by_benchmark or origin or corrupt):
        raise StoreError("prune: say what to drop, by --models, --benchmarks, --origin or --corrupt")

    def picks(model: str, benchmark: str, came: str) -> bool:
        return (
            bool(by_model or by_benchmark or origin)
            and (not by_model or model in by_model)
            and (not by_benchmark or benchmark in by_benchmark)
            and (origin is None or came == origin)
        )

    removed = with_store(place, lambda opened: opened.prune(picks, corrupt))
    wide_console().print(
        f"{place}: dropped {removed.recordings} recordings, {removed.branches} branches, {removed.questions} questions",
        highlight=False,
    )
