"""Static files of the dashboard. Their URLs hold a hash of their content, so that browsers may keep them for good."""

from __future__ import annotations

import asyncio
import gzip
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from proxy.errors import NotFound

FOLDER: Final = Path(str(files("proxy.ui"))) / "static"
MEDIA: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
}
_HASH_CHARS: Final = 16
_KEPT: Final = "public, max-age=31536000, immutable"


@cache
def static_hashes() -> dict[str, str]:
    """Return the hash of each static file by its name, such as `vendor/htmx.min.js`."""
    paths = (path for path in FOLDER.rglob("*") if path.suffix in MEDIA)
    return {path.relative_to(FOLDER).as_posix(): _hash(path) for path in paths}


def static_url(name: str) -> str:
    """Return the URL of a static file. Raises KeyError if there is none, so that a page with a wrong name fails."""
    return f"/ui/static/{static_hashes()[name]}/{name}"


async def serve_static(request: Request) -> Response:
    """Return a static file. Raises NotFound, also for the hash of another version."""
    name, wanted = request.path_params["name"], request.path_params["hash"]
    if static_hashes().get(name) != wanted:
        raise NotFound(f"there is no file {name!r} of this version; reload the page", code="not_found")
    headers = {"cache-control": _KEPT, "vary": "accept-encoding"}
    is_packed = "gzip" in request.headers.get("accept-encoding", "")
    body = await asyncio.to_thread(_packed if is_packed else _plain, name)
    if is_packed:
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers, media_type=MEDIA[Path(name).suffix])


@cache
def _plain(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


@cache
def _packed(name: str) -> bytes:
    return gzip.compress(_plain(name), mtime=0)


def _hash(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:_HASH_CHARS]
