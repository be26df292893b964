"""Uploaded files of recordings: received into a private temporary file, and imported whole or not at all."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from discovery.commands.store import with_store
from discovery.data.importers import read_jsonl
from discovery.errors import BadRecording, StoreError
from discovery.store import AddedCounts, StorePlace
from proxy.errors import BadRequest, RecordsAway, TooLarge

CHUNK: Final = 2**20
"""Bytes that are written to the temporary file at a time."""
_FILE: Final = "upload.jsonl"


class ImportResult(NamedTuple):
    """Result of an import."""

    added: AddedCounts
    known: int  # recordings that were there already


class RecordingImport:
    """Imports of recordings into one store, one at a time."""

    def __init__(self, store: StorePlace, most_bytes: int) -> None:
        self._store = store
        self._most_bytes = most_bytes
        self._is_busy = False

    async def run(self, body: AsyncIterator[bytes]) -> ImportResult:
        """Receive a file and import it. Raises TooLarge, RecordsAway, or BadRequest with the line and the reason."""
        with self._alone(), tempfile.TemporaryDirectory(prefix="autotts-") as folder:
            path = Path(folder) / _FILE
            await self._receive(body, path)
            return await asyncio.to_thread(self._add, path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._is_busy:
            raise BadRequest("another file is being imported; wait until it is done", code="import_running")
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    async def _receive(self, body: AsyncIterator[bytes], path: Path) -> None:
        size, waiting = 0, bytearray()
        with await asyncio.to_thread(lambda: path.open("xb")) as file:
            async for piece in body:
                size += len(piece)
                if size > self._most_bytes:
                    raise TooLarge(
                        f"the file is larger than {self._most_bytes:,} bytes, the limit AUTOTTS_UI_IMPORT_BYTES; "
                        "use `autotts import jsonl`",
                        code="body_too_large",
                    )
                waiting += piece
                if len(waiting) >= CHUNK:
                    await asyncio.to_thread(file.write, bytes(waiting))
                    waiting.clear()
            await asyncio.to_thread(file.write, bytes(waiting))

    def _add(self, path: Path) -> ImportResult:
        """Import a file in an event loop of this thread, because converting its rows takes long."""
        try:
            recordings = read_jsonl(path)
            added = with_store(self._store, lambda opened: opened.add(recordings), create=True)
        except BadRecording as error:
            message = str(error).replace(f"{path}:", "line ").replace(str(path), "the file")
            raise BadRequest(f"nothing was imported: {message}", code="bad_recording") from None
        except StoreError as error:
            raise RecordsAway(f"nothing was imported: {error}") from None
        return ImportResult(added, len(recordings) - added.recordings)
