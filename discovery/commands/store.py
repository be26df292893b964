"""`autotts import`, `autotts store` and `autotts forget`: move recordings into and out of the replay store."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from discovery.commands.console import print_plain, split_names, wide_console
from discovery.commands.options import DEFAULT_STORE, AnyPlace, AsJson, Benchmarks, Models, Place
from discovery.data.atomic_files import OutputKind, atomic_write, check_output, readable_warning
from discovery.data.importers import format_recording_line, holds_recordings, read_jsonl, read_release, release_files
from discovery.data.recordings import Origin, RecordedQuestion, Split, default_split
from discovery.errors import RecordingsNotFound, StoreDamaged, StoreError
from discovery.evaluation.sources import open_source, select_cells
from discovery.store import CellSummary, ForgottenCounts, ServedSummary, Store, StorePlace, parse_place
from discovery.store.copying import copy_store

T = TypeVar("T")

CORRUPT = 1
"""Exit status of a store with corrupt rows."""

importing = typer.Typer(name="import", no_args_is_help=True, help="Import recordings into a replay store.")
store = typer.Typer(name="store", no_args_is_help=True, help="Inspect and maintain a replay store.")

Request = Annotated[str, typer.Option("--request-id", help="forget everything recorded of this request")]
Tenant = Annotated[
    str, typer.Option(help="forget everything recorded of this tenant, a hash that `autotts keys list` shows")
]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="forget everything recorded of requests without a key")]


class SplitBy(StrEnum):
    """How imported questions are assigned to splits."""

    SEARCH = "search"
    VALIDATION = "validation"
    HELD_OUT = "held-out"
    HASH = "hash"  # by the hash of the question


@importing.command("autotts-release")
def import_release(
    paths: Annotated[list[Path], typer.Argument(help="files MODEL/BENCHMARK.json[.xz], or folders of such files")],
    place: Place = DEFAULT_STORE,
    split: Annotated[
        SplitBy | None, typer.Option(help="split of the questions (default: as in the release; aime24 is search)")
    ] = None,
) -> None:
    """Import the public release of the AutoTTS paper."""
    files = [file for path in paths for file in release_files(path)]
    _import(files, read_release, place, split)


@importing.command("jsonl")
def import_jsonl(
    paths: Annotated[list[Path], typer.Argument(help="files of JSON lines, plain or .xz")],
    place: Place = DEFAULT_STORE,
    split: Annotated[
        SplitBy | None, typer.Option(help="split of the questions (default: as given in each line, else by hash)")
    ] = None,
) -> None:
    """Import files in the generic JSON lines format, described in docs/evaluation.md."""
    _import(paths, read_jsonl, place, split)


def _import(
    files: Sequence[Path],
    read: Callable[[Path], list[RecordedQuestion]],
    place: StorePlace,
    split: SplitBy | None,
) -> None:
    """Read every file, then add all recordings or none."""
    console = Console(stderr=True)
    shown = track(files, "reading", console=console, transient=True, disable=not console.is_terminal)
    recordings = [_put(recorded, split) for file in shown for recorded in read(file)]
    added = with_store(place, lambda opened: opened.add(recordings), create=True)
    known = len(recordings) - added.recordings
    wide_console().print(
        f"{place}: {added.recordings} recordings of {added.questions} new questions, {added.branches} branches added; "
        f"{known} recordings were already there",
        highlight=False,
    )
    if wrong := len({recorded.question for recorded in recordings if recorded.judged_wrong}):
        warning = (
            f"questions judged wrong whose right answer is unknown: {wrong:,}; a store does not keep that "
            "(judged_wrong), so labels by feedback count again in their cells. Use the file itself (`--recordings "
            "FILE.jsonl`), or give references to `autotts label`"
        )
        console.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _put(recorded: RecordedQuestion, split: SplitBy | None) -> RecordedQuestion:
    if split is None:
        return recorded
    return replace(recorded, split=default_split(recorded.question) if split is SplitBy.HASH else Split(split))


def with_store(place: StorePlace, work: Callable[[Store], Awaitable[T]], create: bool = False) -> T:
    """Open the store at `place` and return the result of `work` on it."""

    async def run() -> T:
        async with Store.open(place, create=create) as opened:
            return await work(opened)

    return asyncio.run(run())


@store.command()
def info(place: Place = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Show recordings by model, benchmark and split, and the served requests with their feedback."""

    async def read(opened: Store) -> tuple[list[CellSummary], ServedSummary]:
        return await opened.summaries(), await opened.served()

    cells, served = with_store(place, read)
    if as_json:
        figures = [
            cell_summary.cell._asdict() | dict(zip(cell_summary._fields[1:], cell_summary[1:], strict=True))
            for cell_summary in cells
        ]
        sys.stdout.write(json.dumps({"cells": figures, **served._asdict()}, indent=2) + "\n")
        return
    table = Table(title=str(place), title_justify="left")
    for heading in ("model", "benchmark", "split", "questions", "recordings", "complete", "branches"):
        table.add_column(heading, justify="left" if heading in ("model", "benchmark", "split") else "right")
    for cell_summary in cells:
        table.add_row(*cell_summary.cell, *(f"{figure:,}" for figure in cell_summary[1:]))
    console = wide_console()
    console.print(table)
    console.print(_requests(served), highlight=False, markup=False)


def _requests(served: ServedSummary) -> str:
    if not served.episodes:
        return "served requests: none"
    stops = ", ".join(f"{stop}: {count:,}" for stop, count in served.stops.items())
    feedback = ", ".join(f"{kind}: {count:,}" for kind, count in served.feedback.items()) or "none"
    when = f"from {str(served.oldest)[:19]} to {str(served.newest)[:19]} UTC"
    return f"served requests: {served.episodes:,} {when} ({stops})\nfeedback: {feedback}"


@store.command()
def verify(place: Place = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Check that no row is corrupt; exit status 1 if one is, or if SQLite cannot read the file."""
    try:
        checked = with_store(place, Store.verify)
    except StoreDamaged as error:
        print_plain(Console(stderr=True), str(error), "red")
        raise typer.Exit(CORRUPT) from None
    if as_json:
        sys.stdout.write(json.dumps({"rows": dict(checked.rows), "bad": list(checked.bad)}, indent=2) + "\n")
    else:
        console = wide_console()
        counts = ", ".join(f"{count:,} {table}" for table, count in checked.rows.items())
        console.print(f"{place}: {counts}; {len(checked.bad)} corrupt rows", highlight=False)
        for bad_row in checked.bad:
            console.print(bad_row, style="red", highlight=False, markup=False)
    if isinstance(place, Path) and (warning := readable_warning(place, "questions and answers")):
        print_plain(Console(stderr=True), warning, "yellow")
    if checked.bad:
        raise typer.Exit(CORRUPT)


@store.command()
def export(
    to: Annotated[Path, typer.Argument(help="file to write (JSON lines)")],
    place: Place = DEFAULT_STORE,
    models: Models = "",
    benchmarks: Benchmarks = "",
    split: Annotated[Split | None, typer.Option(help="split of the questions (default: all)")] = None,
) -> None:
    """Export recordings to a file that `autotts import jsonl` reads."""
    check_output(to, "export", OutputKind("a file of recordings", holds_recordings))
    source = open_source(place)
    cells = select_cells(source.cells(), split_names(models), split_names(benchmarks), split)
    count = 0
    with atomic_write(to, private=True) as file:
        for cell in cells:
            for recorded in source.load(cell):
                file.write(format_recording_line(recorded).encode())
                count += 1
    wide_console().print(f"{to}: {count} recordings", highlight=False)


@store.command()
def copy(
    source: Annotated[AnyPlace, typer.Argument(parser=parse_place, metavar="FROM", help="store to copy")],
    target: Annotated[AnyPlace, typer.Argument(parser=parse_place, metavar="TO", help="new or empty store")],
) -> None:
    """Copy all records into another store, a file or a PostgreSQL database, and compare them."""

    async def run() -> Mapping[str, int]:
        async with Store.open(source) as opened, Store.open(target, create=True) as other:
            return await copy_store(opened, other)

    counts = ", ".join(f"{count:,} {table}" for table, count in asyncio.run(run()).items())
    wide_console().print(f"{target}: {counts}; all are as in {source}", highlight=False)


def forget(
    request: Request = "", tenant: Tenant = "", anonymous: Anonymous = False, place: Place = DEFAULT_STORE
) -> None:
    """Erase everything recorded of a request or a tenant permanently, including the bytes on disk."""
    if (bool(request), bool(tenant), anonymous).count(True) != 1:
        raise StoreError("forget: give exactly one of --request-id ID, --tenant HASH and --anonymous")

    async def run(opened: Store) -> tuple[bool, ForgottenCounts]:
        name = {"request": request} if request else {"tenant": tenant}
        return await opened.was_forgotten(**name), await opened.forget(**name)

    is_repeated, erased = with_store(place, run)
    whose = request or tenant or "requests without a key"
    if is_repeated and not any(erased):
        wide_console().print(f"{place}: forgotten before; nothing is left of {whose}", highlight=False)
        return
    if not any(erased):
        advice = "; a tenant is the hash of a key's name, which `autotts keys list` shows" if tenant else ""
        raise RecordingsNotFound(f"{place}: nothing is recorded of {whose}; it is now noted as forgotten{advice}")
    wide_console().print(
        f"{place}: erased {erased.episodes} episodes, {erased.feedback} feedback entries, "
        f"{erased.recordings} recordings, {erased.labels} labels, and "
        f"{erased.questions} questions without other recordings",
        highlight=False,
    )


@store.command()
def prune(
    place: Place = DEFAULT_STORE,
    models: Annotated[str, typer.Option(help="drop recordings of these models")] = "",
    benchmarks: Annotated[str, typer.Option(help="drop recordings of these benchmarks")] = "",
    origin: Annotated[Origin | None, typer.Option(help="drop recordings of this origin")] = None,
    corrupt: Annotated[bool, typer.Option("--corrupt", help="drop corrupt recordings")] = False,
) -> None:
    """Drop the recordings that match all given options and, with --corrupt, the corrupt ones."""
    by_model, by_benchmark = split_names(models), split_names(benchmarks)
    known_models, known_benchmarks = set[str](), set[str]()
    if not (by_model or by_benchmark or origin or corrupt):
        raise StoreError("prune: say what to drop with --models, --benchmarks, --origin or --corrupt")

    def is_selected(model: str, benchmark: str, recorded_by: str) -> bool:
        known_models.add(model)
        known_benchmarks.add(benchmark)
        return (
            bool(by_model or by_benchmark or origin)
            and (not by_model or model in by_model)
            and (not by_benchmark or benchmark in by_benchmark)
            and (origin is None or recorded_by == origin)
        )

    removed = with_store(place, lambda opened: opened.prune(is_selected, corrupt))
    wide_console().print(
        f"{place}: dropped {removed.recordings} recordings, {removed.branches} branches, {removed.questions} questions",
        highlight=False,
    )
    for kind, given, known in (("model", by_model, known_models), ("benchmark", by_benchmark, known_benchmarks)):
        if unknown := [name for name in given if name not in known]:
            print_plain(
                wide_console(),
                f"no recording has the {kind} {', '.join(unknown)}; there are: {', '.join(sorted(known)) or 'none'}",
            )
