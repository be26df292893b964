"""Pool of worker processes that end when the process that uses them does, however it ends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Final, TypeVar

from discovery.errors import EngineError

T = TypeVar("T")

LONGEST_FOLDER: Final = 71
"""Bytes of the longest temporary folder.

A Unix socket's path has at most 103 bytes on all systems, of which multiprocessing appends 32.
"""


def make_worker_pool(workers: int, preload: Sequence[str]) -> ProcessPoolExecutor:
    """Return a pool of fresh processes, forked from one that has imported the modules `preload` and runs no threads.

    Raises EngineError if the path of the temporary folder is too long for a socket.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise EngineError(
            f"TMPDIR: {folder!r} is too long for the sockets of worker processes; "
            f"set it to a folder of at most {LONGEST_FOLDER} bytes, such as /tmp"
        )
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_watch_parent)


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def translate_errors(future: Future[T], translate: Callable[[BaseException], BaseException]) -> Future[T]:
    """Return a future with the result of another one, or with its exception as `translate` returns it."""
    translated: Future[T] = Future()
    future.add_done_callback(partial(_settle, translated, translate))
    return translated


def _settle(translated: Future[T], translate: Callable[[BaseException], BaseException], ended: Future[T]) -> None:
    if ended.cancelled():
        translated.cancel()
    elif (error := ended.exception()) is not None:
        translated.set_exception(translate(error))
    else:
        translated.set_result(ended.result())


def _watch_parent() -> None:
    """End this worker once the user of the pool has ended.

    Without it, workers of a killed process would wait for work forever: each holds the other end of its own queue.
    """
    Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
