"""Check request heads: refuse those that HTTP implementations could interpret differently."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

from proxy.errors import BadRequest, HeadTooLarge

Headers = Sequence[tuple[bytes, bytes]]

MOST_HEADERS: Final = 100
MOST_HEAD_BYTES: Final = 32 * 2**10
"""Maximum bytes of a request's target and headers together."""
MOST_REMEMBERED: Final = 256
"""Number of targets, and of values of Host, that are known to be valid. Clients send few different ones."""
SINGLE_HEADERS: Final = (
    b"authorization",
    b"x-api-key",
    b"content-type",
    b"content-length",
    b"content-encoding",
    b"transfer-encoding",
    b"expect",
)
"""Headers that the proxy interprets. Each may occur once: of two, a gateway in front could use the other one."""
NAME_PREFIXES: Final = ("/v1/models/", "/v1/tts/requests/")
"""Path prefixes that are followed by a name, which may be percent-encoded. No other path may be."""
SLASHED_PATHS: Final = frozenset({"/ui/"})
"""Paths that may end in a slash, because people type them into browsers; they are redirected."""

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE")
MOST_SHOWN: Final = 200
"""Bytes of a refused request's target that the log message is built from."""
KNOWN_SEGMENTS: Final = frozenset(
    {"", ".", "..", "v1", "chat", "completions", "responses", "models", "tts", "curve", "feedback", "keys", "requests"}
    | {"openapi.json", "health", "ready", "metrics", "embeddings", "score", "rerank", "tokenize", "detokenize"}
    | {"messages", "count_tokens", "version", "tokenizer_info", "ping", "docs"}
)
"""Path segments that the log may show: the segments of known endpoints."""

_UPGRADE_HEADERS: Final = (b"upgrade", b"http2-settings")
_TARGET: Final = re.compile(rb"/[!-~]*")
_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~@:!$&'()*+,;=-]*)+")
_NAME: Final = re.compile(r"(?:[A-Za-z0-9._~@:!$&'()*+,;=/-]|%[0-9A-Fa-f]{2})+")
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


def check_head(version: str, method: bytes, target: bytes, headers: Headers) -> None:
    """Raise BadRequest if a request's head is ambiguous or invalid."""
    if len(headers) > MOST_HEADERS or len(target) + sum([len(n) + len(v) + 4 for n, v in headers]) > MOST_HEAD_BYTES:
        raise head_too_large()
    names = [name for name, _ in headers]
    if version not in ("1.0", "1.1"):
        raise BadRequest("unsupported HTTP version; use HTTP/1.1", code="bad_version")
    if version == "1.0" and b"transfer-encoding" in names:
        raise BadRequest(
            "HTTP/1.0 does not support transfer-encoding; use HTTP/1.1", param="transfer-encoding", code="bad_header"
        )
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not _is_host(hosts[0]):
        raise BadRequest(
            "a request must have exactly one Host header of the form NAME or NAME:PORT", param="host", code="bad_host"
        )
    if len(set(names)) < len(names):
        for name in SINGLE_HEADERS:
            if names.count(name) > 1:
                raise BadRequest(
                    f"{name.decode()} is given more than once; send it once", param=name.decode(), code="bad_header"
                )
    if method == b"CONNECT":
        raise BadRequest("CONNECT is not supported: this server is not a forward proxy", code="bad_target")
    check_target(target)


@lru_cache(MOST_REMEMBERED)
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


@lru_cache(MOST_REMEMBERED)
def check_target(target: bytes) -> None:
    """Raise BadRequest unless `target` is an unambiguous path, with or without a query."""
    if not _TARGET.fullmatch(target) or b"#" in target:
        raise BadRequest("the request target must be a path; this server is not a forward proxy", code="bad_target")
    path = target.partition(b"?")[0].decode()
    if path not in SLASHED_PATHS and not _is_plain(path):
        raise BadRequest(_path_problem(path), code="bad_path")


def _is_plain(path: str) -> bool:
    below = next((prefix for prefix in NAME_PREFIXES if path.startswith(prefix)), None)
    if below is None:
        is_valid = _PATH.fullmatch(path) is not None
    else:
        name = path.removeprefix(below)
        path = below + unquote(name, errors="replace")
        is_valid = bool(_NAME.fullmatch(name)) and path.isprintable() and not {"\\", "\ufffd"} & set(path)
    return is_valid and (path == "/" or not {"", ".", ".."} & set(path[1:].split("/")))


def _path_problem(path: str) -> str:
    """Return the error message about a path that is not plain. The path itself is never quoted."""
    parts = path[1:].split("/")
    if len(parts) > 1 and not parts[-1] and _is_plain(path.rstrip("/")):
        return "the path ends in a slash; remove it"
    if "" in parts:
        return "the path has an empty part (two slashes in a row); remove it"
    if {".", ".."} & set(parts):
        return "the path has a part that is `.` or `..`; send the resolved path"
    return "the path has encoded or unusual characters; send the path without percent-encoding"


def redacted_path(target: bytes) -> str:
    """Return a request's path for the log. Unknown segments become `…`, because clients may send anything."""
    parts = target[:MOST_SHOWN].partition(b"?")[0].decode("latin-1").split("/")
    return "/".join(part if part in KNOWN_SEGMENTS else "…" for part in parts)


def head_too_large() -> HeadTooLarge:
    limits = f"{MOST_HEADERS} headers and {MOST_HEAD_BYTES} bytes"
    return HeadTooLarge(f"the request head is too large; at most {limits} are allowed", code="head_too_large")


def without_upgrade(headers: Headers) -> Headers:
    """Return the headers without the offer of a protocol upgrade. A server may ignore such an offer."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name == b"connection":
            tokens = (token.strip() for token in value.split(b","))
            value = b", ".join(token for token in tokens if token.lower() not in _UPGRADE_HEADERS)
            if not value:
                continue
        if name not in _UPGRADE_HEADERS:
            kept.append((name, value))
    return kept


def serialise_head(method: bytes, target: bytes, version: str, headers: Headers) -> bytes:
    """Serialise a request head."""
    lines = [b"%b %b HTTP/%b" % (method, target, version.encode()), *(b"%b: %b" % header for header in headers)]
    return b"\r\n".join([*lines, b"", b""])
