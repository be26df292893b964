"""Options that several commands share, and the output that `--json FILE|-` selects."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from discovery.data.atomic_files import atomic_write, check_writable_path
from discovery.evaluation.engines import EngineName
from discovery.evaluation.evaluate import ANSWERS_HELP, AnswerComparison

DEFAULT_STORE: Final = Path("autotts.db")
"""Default file of the store."""
STDOUT: Final = "-"
"""Value of `--json` that selects standard output."""

Place = Annotated[Path, typer.Option("--store", envvar="AUTOTTS_STORE", help="file of the store")]
RecordingsPath = Annotated[
    Path, typer.Option(help="replay store, or folder of the AutoTTS release such as ../shared/replay/autotts")
]
Models = Annotated[str, typer.Option(help="models, separated by commas (default: all)")]
Benchmarks = Annotated[str, typer.Option(help="benchmarks, separated by commas (default: all)")]
Answers = Annotated[AnswerComparison, typer.Option(help=ANSWERS_HELP)]
Betas = Annotated[str, typer.Option(help="values of β, separated by commas")]
Shuffles = Annotated[int, typer.Option(min=1, max=10_000, help="branch orders per question")]
ProbeTokens = Annotated[int | None, typer.Option(min=0, help="tokens charged per probe (default: as recorded)")]
MaxBranches = Annotated[int, typer.Option(min=1, help="maximum branches per episode")]
EngineChoice = Annotated[
    EngineName, typer.Option(help="where episodes run: in this process, in worker processes, or on Ray")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="workers for --engine process and ray (default: one per core)")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
JsonTarget = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="write the figures as JSON to FILE, or to standard output with -"),
]


def check_json_target(json_to: str | None) -> None:
    """Raise FileWriteError, before costly work, if the file given with `--json` could not be written."""
    if json_to not in (None, STDOUT):
        check_writable_path(Path(json_to), "--json")


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
