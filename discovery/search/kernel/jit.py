"""Compilation by numba, which is optional, and its cache on disk.

numba checks a cached function against its own file only. The cache is therefore in a folder named by the hash of all
files with compiled code: a change to any of them compiles everything anew.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

COMPILED_FILES: Final = ("choices.py", "episode.py", "records.py", "stop_rules.py", "votes.py", "waves.py")
"""Files with compiled code, and with constants and layouts that it contains."""

log = logging.getLogger(__name__)


def is_available() -> bool:
    """Return whether numba is installed and can be imported; it refuses versions of numpy that it does not know."""
    if find_spec("numba") is None:
        return False
    try:
        import_module("numba")
    except ImportError as error:
        log.warning("numba is installed, but cannot be imported: %s", error)
        return False
    return True


def compiled(function: F) -> F:
    """Compile `function` at its first call, and cache the result on disk if that is possible.

    Calls release the GIL. Floats are computed as Python does: no fast maths and no fused operations. Indices are not
    checked. Raises ImportError without numba.
    """
    import numba

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}
    folder = cache_folder()
    if folder is None:
        return cast(F, numba.njit(**options)(function))
    chosen = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)  # read when a function is wrapped
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    finally:
        numba.config.CACHE_DIR = chosen


@cache
def cache_folder() -> Path | None:
    """Return the folder for compiled code, which exists and can be written; None if there is none.

    It is inside `NUMBA_CACHE_DIR` if that is set, else inside the user's cache folder.
    """
    named = f"kernel-{_digest()}"
    try:
        if chosen := os.environ.get("NUMBA_CACHE_DIR"):
            folder = Path(chosen) / named
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autotts" / named
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        log.warning("compiled code is not cached, because %s; set NUMBA_CACHE_DIR to a writable folder", error)
        return None
    return folder


def _digest() -> str:
    folder = Path(__file__).parent
    return sha256(b"\0".join((folder / name).read_bytes() for name in COMPILED_FILES)).hexdigest()[:12]
