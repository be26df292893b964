"""Transcript of all requests to an endpoint and its responses, with which a run can be replayed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from discovery.data.hash_chained_log import append_line, begins_as
from discovery.data.safe_json import parse_json
from discovery.errors import ExplorerError, HistoryError

Response = Mapping[str, Any]
_LINE_START: Final = b'{"key": "'


def exchange_key(seed: int, step: int, call: int, request: Mapping[str, Any]) -> str:
    """Return the key of an exchange: a hash of seed, step, call number and request."""
    return sha256(json.dumps([seed, step, call, request], sort_keys=True).encode()).hexdigest()


class Transcript:
    """Exchanges as JSON lines in a file; each is on the disk before it is used.

    Without a path they are kept in memory only. A torn last line is dropped when the file is opened. Raises
    HistoryError if any other line is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._responses: dict[str, tuple[Mapping[str, Any], Response]] = {}  # request and response by key
        if path is not None and path.exists():
            self._read(path)

    def record(self, key: str, request: Mapping[str, Any], response: Response) -> None:
        """Record an exchange permanently. Raises ExplorerError if it cannot be written."""
        line = json.dumps({"key": key, "request": request, "response": response})
        if self._path is not None:
            try:
                append_line(self._path, line.encode())
            except OSError as error:
                raise ExplorerError(f"{self._path}: {error.strerror}; no call is made without a transcript") from None
        self._responses[key] = request, response

    def replay(self, key: str) -> Response | None:
        """Return the recorded response; None if there is none."""
        known = self._responses.get(key)
        return None if known is None else known[1]

    def __len__(self) -> int:
        return len(self._responses)

    def exchanges(self) -> Iterator[tuple[Mapping[str, Any], Response]]:
        """Yield every request with its response, in recorded order."""
        yield from self._responses.values()

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise HistoryError(f"{path}: {error.strerror}") from None
        ended = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:ended].splitlines(), 1):
            try:
                read = parse_json(line)
                self._responses[read["key"]] = read["request"], read["response"]
            except (ValueError, KeyError, TypeError):
                raise HistoryError(f"{path}: line {number} is not a recorded exchange") from None
        if not begins_as(data[ended:], _LINE_START):
            raise HistoryError(f"{path}: its last line is not a recorded exchange; move the file away")
        if ended < len(data):
            os.truncate(path, ended)
