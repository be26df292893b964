"""Callbacks that run when a request ends, such as those that release its slot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal


class Leases(ExitStack):
    """An ExitStack of callbacks without arguments only. It is several times faster, and every request has one."""

    def __init__(self) -> None:
        self._releases: list[Callable[[], Any]] = []

    def callback(self, callback: Callable[[], Any], /) -> Callable[[], Any]:  # type: ignore[override]
        """Run `callback` at the end, before all that were added earlier."""
        self._releases.append(callback)
        return callback

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.close()
        return False

    def close(self) -> None:
        """Run the callbacks, each once. All of them run, and then the first error is raised."""
        while self._releases:
            try:
                self._releases.pop()()
            except BaseException:
                self.close()
                raise
