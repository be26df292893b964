"""Judge the heads of requests: those that could mean different things to different readers are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote

from proxy.errors import BadRequest, HeadTooLarge

Headers = Sequence[tuple[bytes, bytes]]

MOST_HEADERS: Final = 100
MOST_HEAD_BYTES: Final = 32 * 2**10
"""Most bytes of a request's first line and headers together."""
ONCE: Final = (
    *(b"authorization", b"content-type", b"content-length", b"content-encoding", b"transfer-encoding", b"expect"),
)
"""Headers that mean something here, so nobody on the way may understand another one of them."""
ENCODED: Final = ("/v1/models/", "/v1/tts/requests/")
"""Below these a path ends in a name, which may be percent-encoded. Nowhere else is there a reason to."""

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE")
MOST_SHOWN: Final = 200
"""Characters of a refused request's path that are looked at for the log."""
PARTS: Final = frozenset(
    {"", ".", "..", "v1", "chat", "completions", "responses", "models", "tts", "curve", "feedback", "keys", "requests"}
    | {"openapi.json", "health", "ready", "metrics", "embeddings", "score", "rerank", "tokenize", "detokenize"}
    | {"messages", "count_tokens", "version", "tokenizer_info", "ping", "docs"}
)
"""Parts of paths that the log may show: those of the endpoints."""

_OFFER: Final = (b"upgrade", b"http2-settings")
_TARGET: Final = re.compile(rb"/[!-~]*")
_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~@:!$&'()*+,;=-]*)+")
_NAME: Final = re.compile(r"(?:[A-Za-z0-9._~@:!$&'()*+,;=/-]|%[0-9A-Fa-f]{2})+")
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


def check_head(version: str, target: bytes, headers: Headers) -> None:
    """Raise BadRequest unless a request's head means one thing to everybody."""
    if len(headers) > MOST_HEADERS or len(target) + sum(len(n) + len(v) + 4 for n, v in headers) > MOST_HEAD_BYTES:
        raise too_large()
    names = [name for name, _ in headers]
    if version not in ("1.0", "1.1"):
        raise BadRequest("this is no HTTP/1.1", code="bad_version")
    if version == "1.0" and b"transfer-encoding" in names:
        raise BadRequest("HTTP/1.0 has no transfer-encoding", param="transfer-encoding", code="bad_header")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        raise BadRequest("a request must have one Host header, a name and a port", param="host", code="bad_host")
    for name in ONCE:
        if names.count(name) > 1:
            raise BadRequest(f"{name.decode()} is given more than once", param=name.decode(), code="bad_header")
    check_target(target)


def check_target(target: bytes) -> None:
    """Raise BadRequest unless `target` is a path, with or without a query, that can be read in one way only."""
    if not _TARGET.fullmatch(target) or b"#" in target:
        raise BadRequest("the target must be a path; this is no forward proxy", code="bad_target")
    path = target.partition(b"?")[0].decode()
    if not _is_plain(path):
        raise BadRequest(_what_is_wrong(path), code="bad_path")


def _is_plain(path: str) -> bool:
    below = next((prefix for prefix in ENCODED if path.startswith(prefix)), None)
    if below is None:
        is_spelt_well = _PATH.fullmatch(path) is not None
    else:
        name = path.removeprefix(below)
        path = below + unquote(name, errors="replace")
        is_spelt_well = bool(_NAME.fullmatch(name)) and path.isprintable() and not {"\\", "\ufffd"} & set(path)
    return is_spelt_well and (path == "/" or not {"", ".", ".."} & set(path[1:].split("/")))


def _what_is_wrong(path: str) -> str:
    """The message about a path that is not plain. Only what it is made of is named, never quoted."""
    parts = path[1:].split("/")
    if len(parts) > 1 and not parts[-1] and _is_plain(path.rstrip("/")):
        return "the path ends in a slash; leave it out"
    if "" in parts:
        return "the path has an empty part (two slashes in a row); send it plain"
    if {".", ".."} & set(parts):
        return "the path has a part that is `.` or `..`; send it plain"
    return "the path has encoded or unusual characters; send it plain"


def shown_path(target: bytes) -> str:
    """The path of a request for the log: parts no endpoint has are shortened, because a client may write anything."""
    parts = target[:MOST_SHOWN].partition(b"?")[0].decode("latin-1").split("/")
    return "/".join(part if part in PARTS else "…" for part in parts)


def too_large() -> HeadTooLarge:
    most = f"{MOST_HEADERS} headers and {MOST_HEAD_BYTES} bytes"
    return HeadTooLarge(f"the head of a request may have {most}", code="head_too_large")


def without_upgrade(headers: Headers) -> Headers:
    """Return a request's headers without its offer to go on in another protocol, which a server may ignore."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name == b"connection":
            tokens = (token.strip() for token in value.split(b","))
            value = b", ".join(token for token in tokens if token.lower() not in _OFFER)
            if not value:
                continue
        if name not in _OFFER:
            kept.append((name, value))
    return kept


def rewritten(method: bytes, target: bytes, version: str, headers: Headers) -> bytes:
    """Return the bytes of a request's head."""
    lines = [b"%b %b HTTP/%b" % (method, target, version.encode()), *(b"%b: %b" % header for header in headers)]
    return b"\r\n".join([*lines, b"", b""])
