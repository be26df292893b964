"""Target values for rows of the benchmarks, and whether the measured figures reach them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from tests.bench.__main__ import COMPILED
from tests.bench.rows import Row

NUMBER: Final = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")
"""A number as tables write it, such as 1,234.5."""


class Aim(NamedTuple):
    """A target value for the first number in one cell of a row."""

    row: str  # expression that the row's first cell begins with
    column: str  # field of Row
    bound: float
    is_minimum: bool = True
    is_compiled: bool | None = None  # whether it is about rows of the compiled core; None: both
    compared: str = ""  # text in the cell of what is compared, if several rows begin alike


class AimOutcome(NamedTuple):
    """An aim and the figure that was measured."""

    aim: Aim
    row: str
    measured: float

    @property
    def is_reached(self) -> bool:
        """Whether the figure is within the bound."""
        return self.measured >= self.aim.bound if self.aim.is_minimum else self.measured <= self.aim.bound


_OWN: Final = "own CPU of a request, 16 branches, 10 rounds of 64 tokens: controller in the process"
AIMS: Final = (
    Aim("evaluator / bare loop", "ratio", 1.8, is_minimum=False, is_compiled=False),
    Aim("evaluator / bare loop", "ratio", 1.0, is_minimum=False, is_compiled=True),
    Aim("traces on / off", "ratio", 1.25, is_minimum=False),
    Aim("--engine local / process, two workers", "ratio", 1.8),
    Aim("sandboxed decisions per second: CMC β=1,", "measured", 60_000, is_compiled=True),
    Aim("cascade, candidates per minute", "compared", 60, is_compiled=True),
    Aim("grammar search, episodes per processor second", "ratio", 50, is_compiled=False),
    Aim("evaluate --engine ray, one worker / two", "ratio", 1.6),
    Aim("episodes acknowledged", "measured", 5_000),
    Aim("forwarding, 50 connections", "ratio", 1.0),
    Aim("forwarding, one connection, p50", "ratio", 0.3, is_minimum=False),
    Aim("200 SSE streams$", "ratio", 0.92, compared="direct"),
    Aim("200 SSE streams, first byte p50", "measured", 20, is_minimum=False),
    Aim(_OWN, "measured", 15, is_minimum=False),
    Aim("SC@16 through the proxy, tokens/s", "ratio", 0.95),
    Aim(r"default .*: accuracy$", "measured", -0.1),
    Aim(r"default .*: accuracy of the worst model", "measured", -1.5),
    Aim(r"default .*: tokens$", "ratio", 0.3, is_minimum=False),
    Aim(r"default .*: critical path$", "ratio", 1.7, is_minimum=False),
    Aim("page ", "measured", 300, is_minimum=False),
)


def outcomes(rows: Iterable[Row], aims: Iterable[Aim] = AIMS) -> list[AimOutcome]:
    """Return the aims whose rows were measured, with their figures. An aim may have several rows."""
    listed = list(rows)
    return [
        AimOutcome(aim, row.bench, figure)
        for aim in aims
        for row in listed
        if _is_row(aim, row) and (figure := read_number(getattr(row, aim.column))) is not None
    ]


def read_number(cell: str) -> float | None:
    """Return the first number in a cell, such as 1,234.5 of "1,234.5 /s"; None if there is none."""
    number = NUMBER.search(cell)
    return None if number is None else float(number[0].replace(",", ""))


def _is_row(aim: Aim, row: Row) -> bool:
    """Return whether an aim is about a row."""
    fits_core = aim.is_compiled is None or row.bench.endswith(COMPILED) == aim.is_compiled
    return fits_core and re.match(aim.row, row.bench) is not None and aim.compared in row.compared
