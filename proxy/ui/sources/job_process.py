"""Entry point of a command that the dashboard runs. It ends with the proxy, even if that is killed."""

from __future__ import annotations

import ctypes
import runpy
import signal
import sys
from typing import Final

_PDEATHSIG: Final = 1  # of prctl


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends. Other systems rely on the parent's own clean-up."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


if __name__ == "__main__":
    end_with_parent()
    runpy.run_module("proxy.cli", run_name="__main__", alter_sys=True)  # by name: the command line is a layer above
