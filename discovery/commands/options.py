"""Options that several commands share, and the output that `--json FILE|-` selects."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from controllers.signals import ALL_SIGNALS, NO_SIGNALS, Signal, parse_signals
from discovery.commands.console import split_names
from discovery.data.atomic_files import OutputKind, atomic_write, check_output
from discovery.evaluation.engines import EngineName
from discovery.evaluation.evaluate import ANSWERS_HELP, AnswerComparison
from discovery.store import DatabaseUrl, StorePlace, parse_place

DEFAULT_STORE: Final = Path("autotts.db")
"""Default file of the store."""
STORE_VARIABLE: Final = "AUTOTTS_STORE"
STDOUT: Final = "-"
"""Value of `--json` that selects standard output."""

Who = Annotated[str | None, typer.Option(help="name for the audit log (default: the user's)")]

if TYPE_CHECKING:
    AnyPlace = StorePlace
else:
    AnyPlace = object  # Typer refuses a union, and the type does not matter to it where there is a parser

Place = Annotated[
    AnyPlace,
    typer.Option(
        "--store",
        parser=parse_place,
        metavar="STORE",
        envvar="AUTOTTS_STORE",
        show_envvar=True,
        help="file of the store, or postgresql:// URL",
    ),
]


def parse_registry(text: str) -> StorePlace:
    """Return the place of a registry. Raises StoreError."""
    return parse_place(text, "registry")


def parse_ledger(text: str) -> StorePlace:
    """Return the place of a ledger. Raises StoreError."""
    return parse_place(text, "ledger")


def registry_option(meaning: str, variable: str | None = None) -> Any:
    """Return the option `--registry`, with what a command does with it and the environment variable that sets it."""
    return typer.Option("--registry", parser=parse_registry, metavar="FOLDER|URL", help=meaning, envvar=variable)


RegistryPlace = Annotated[
    AnyPlace | None,
    registry_option(
        "installed controllers: a folder or a postgresql:// URL (default: the database in AUTOTTS_STORE)",
        "AUTOTTS_REGISTRY",
    ),
]
LedgerPlace = Annotated[
    AnyPlace | None,
    typer.Option(
        "--ledger",
        parser=parse_ledger,
        metavar="FILE|URL",
        help="file or postgresql:// URL that keeps every judgement on these recordings permanently",
    ),
]
RecordingsPlace = Annotated[
    AnyPlace,
    typer.Option(
        parser=parse_place,
        metavar="STORE|FILE|FOLDER",
        help="replay store (file or postgresql:// URL), file of recordings (.jsonl or .jsonl.xz), or folder of the "
        "AutoTTS release such as ../shared/replay/autotts",
    ),
]
Models = Annotated[str, typer.Option(help="models, separated by commas (default: all)")]
Benchmarks = Annotated[str, typer.Option(help="benchmarks, separated by commas (default: all)")]
Answers = Annotated[AnswerComparison, typer.Option(help=ANSWERS_HELP)]
Betas = Annotated[str, typer.Option(help="values of β, separated by commas")]
Shuffles = Annotated[int, typer.Option(min=1, max=10_000, help="branch orders per question")]
ProbeTokens = Annotated[
    int | None, typer.Option(min=0, help="tokens charged per probe (default: as recorded, nothing where none are)")
]
MaxBranches = Annotated[int, typer.Option(min=1, help="maximum branches per episode")]
ShownSignals = Annotated[
    str, typer.Option(help="signals that controllers get, if they declare them: all, none, intervals, probes")
]
EngineChoice = Annotated[
    EngineName, typer.Option(help="where episodes run: in this process, in worker processes, or on Ray")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="workers for --engine process and ray (default: one per core)")
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="for --engine ray: a running Ray cluster (default: a local one, stopped afterwards)"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
JsonTarget = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="write the figures as JSON to FILE, or to standard output with -"),
]


def registry_place(given: StorePlace | None) -> StorePlace:
    """Return the registry that an option names, or the database of a store in AUTOTTS_STORE. Raises BadParameter."""
    if given is not None:
        return given
    if store := os.environ.get(STORE_VARIABLE):
        place = parse_place(store)
        if isinstance(place, DatabaseUrl):
            return place
    raise typer.BadParameter(
        "--registry is needed: a folder, or a postgresql:// URL; or set AUTOTTS_REGISTRY, or AUTOTTS_STORE to a "
        "database whose registry is meant"
    )


def parse_shown_signals(text: str) -> frozenset[Signal]:
    """Parse the signals that controllers get: `all`, `none`, or names separated by commas. Raises BadParameter."""
    if text in ("all", "none"):
        return ALL_SIGNALS if text == "all" else NO_SIGNALS
    try:
        return parse_signals(split_names(text))
    except ValueError as error:
        raise typer.BadParameter(f"--signals: {error}, and all and none") from None


def user_name() -> str:
    """Return the name of the user who runs the command, for audits and ledgers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # containers may run as a number without a name
        return "unknown"


def check_cluster_options(engine: StrEnum, address: str | None, workers: int | None) -> None:
    """Raise BadParameter if `--address` does not go with the engine, or with `--workers`."""
    if address is None:
        return
    if engine != EngineName.RAY:
        raise typer.BadParameter(f"--address {address}: only --engine ray uses a cluster; add it, or leave this out")
    if workers is not None:
        raise typer.BadParameter(
            f"--workers {workers}: the cluster at --address has its own number of workers; leave --workers out"
        )


def check_json_target(json_to: str | None, kind: OutputKind) -> None:
    """Raise FileWriteError, before costly work, if the file given with `--json` may not or could not be written."""
    if json_to not in (None, STDOUT):
        check_output(Path(json_to), "--json", kind)


def output_figures(
    figures: str, json_to: str | None, show_tables: Callable[[], None], *, private: bool = False
) -> None:
    """Print the JSON if `--json` selects standard output; else show the tables and write the file, if one is given.

    With `private`, only its owner can read a new file. Raises FileWriteError.
    """
    if json_to == STDOUT:
        sys.stdout.write(figures)
        return
    show_tables()
    if json_to is not None:
        with atomic_write(Path(json_to), private=private) as file:
            file.write(figures.encode())
