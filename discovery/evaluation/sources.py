"""Sources of recordings: a store, a folder of the public release, or one file of either format."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from discovery.data.importers import read_jsonl, read_release, release_cell, release_files
from discovery.data.recordings import Cell, RecordedQuestion, Split
from discovery.errors import RecordingsNotFound
from discovery.store import DatabaseUrl, Store, StorePlace


class RecordingSource(Protocol):
    """Source of recordings: lists its cells immediately and reads recordings on demand."""

    def cells(self) -> Sequence[Cell]:
        """Return the available cells, in a stable order."""
        ...

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        """Return the recordings of one cell, in the order they were recorded."""
        ...


class ReleaseFolderSource:
    """Files of the public release."""

    def __init__(self, path: Path) -> None:
        self._files = {release_cell(file): file for file in release_files(path)}

    def cells(self) -> Sequence[Cell]:
        return list(self._files)

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        return read_release(self._files[cell])


class FileSource:
    """A file of the generic format. It is read immediately, because only its lines name their cells."""

    def __init__(self, path: Path) -> None:
        self._questions: dict[Cell, list[RecordedQuestion]] = {}
        for question in read_jsonl(path):
            self._questions.setdefault(question.cell, []).append(question)

    def cells(self) -> Sequence[Cell]:
        return list(self._questions)

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        return self._questions[cell]


class StoreSource:
    """A replay store."""

    def __init__(self, place: StorePlace) -> None:
        self._place = place

    def cells(self) -> Sequence[Cell]:
        return asyncio.run(self._cells())

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        return asyncio.run(self._load(cell))

    async def _cells(self) -> list[Cell]:
        async with Store.open(self._place) as store:
            return [summary.cell for summary in await store.summaries()]

    async def _load(self, cell: Cell) -> list[RecordedQuestion]:
        async with Store.open(self._place) as store:
            return await store.load(cell)


def open_source(place: StorePlace) -> RecordingSource:
    """Open the recordings at `place`. Raises DiscoveryError if there are none or they cannot be read."""
    if isinstance(place, DatabaseUrl):
        return StoreSource(place)
    path = place
    if not path.exists():
        raise RecordingsNotFound(f"{path}: no such file or folder; name a store, or a folder of recordings")
    name = path.name.removesuffix(".xz")
    if path.is_dir() or name.endswith(".json"):
        return ReleaseFolderSource(path)
    return FileSource(path) if name.endswith(".jsonl") else StoreSource(path)


def select_cells(
    cells: Sequence[Cell], models: Sequence[str], benchmarks: Sequence[str], split: Split | None
) -> list[Cell]:
    """Return the selected cells. An empty list of models or benchmarks selects all of them.

    Raises RecordingsNotFound, which names the missing model, benchmark or cell.
    """
    if not cells:
        raise RecordingsNotFound("there are no recordings yet; `autotts collect` makes some")
    for kind, wanted, available in (
        ("model", models, {cell.model for cell in cells}),
        ("benchmark", benchmarks, {cell.benchmark for cell in cells}),
        ("split", [split] if split else [], {cell.split for cell in cells}),
    ):
        for name in wanted:
            if name not in available:
                raise RecordingsNotFound(
                    f"no recordings of {kind} {str(name)!r}; available: {', '.join(sorted(available))}"
                )
    chosen = [
        cell
        for cell in cells
        if (not models or cell.model in models)
        and (not benchmarks or cell.benchmark in benchmarks)
        and (split is None or cell.split == split)
    ]
    if not chosen:
        listed = "; ".join(" ".join(cell) for cell in cells)
        raise RecordingsNotFound(
            f"no cell matches all of the requested models, benchmarks and split; available: {listed}"
        )
    return chosen
