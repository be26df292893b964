"""Responses are written in as few pieces as possible, and no piece is lost or late."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proxy.http.flow_control import ResponseTransport, UnboundedLength

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class RecordingTransport:
    """Transport that keeps what is written, by call."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        self.written.append(b"".join(pieces))

    def is_closing(self) -> bool:
        return False


def response(
    written: RecordingTransport, closed: list[str], *, length: int, is_chunked: bool = False, method: str = "GET"
) -> tuple[ResponseTransport, Any]:
    cycle = SimpleNamespace(
        response_started=False,
        chunked_encoding=is_chunked,
        expected_content_length=length,
        scope={"method": method},
    )
    return ResponseTransport(cast(Any, written), cast(Any, cycle), lambda: closed.append("closed")), cycle


def test_a_head_is_written_with_a_body_of_known_length() -> None:
    written, closed = RecordingTransport(), list[str]()
    outlet, cycle = response(written, closed, length=6)
    outlet.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    cycle.response_started = True
    outlet.write(HEAD)
    assert len(written.written) == 1
    outlet.write(b"abc")
    outlet.write(b"def")
    assert written.written == [b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"abc", b"def"]
    outlet.close()
    assert closed == ["closed"]
    assert len(written.written) == 3


@pytest.mark.parametrize(
    "kind",
    [
        {"length": 0},
        {"length": 0, "is_chunked": True},
        {"length": UnboundedLength()},
        {"length": 5, "method": "HEAD"},
    ],
)
def test_a_head_is_written_at_once_if_no_body_follows_at_once(kind: dict[str, Any]) -> None:
    written = RecordingTransport()
    outlet, cycle = response(written, [], **kind)
    cycle.response_started = True
    outlet.write(HEAD)
    assert written.written == [HEAD]


def test_a_head_whose_body_never_comes_is_written_before_the_connection_closes() -> None:
    written, closed = RecordingTransport(), list[str]()
    outlet, cycle = response(written, closed, length=5)
    cycle.response_started = True
    outlet.write(HEAD)
    outlet.close()
    assert (written.written, closed) == ([HEAD], ["closed"])
