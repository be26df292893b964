"""Signals in children of tests, which heed SIGHUP and SIGINT even if pytest was started to ignore them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.readability import ROOT

CHILD = "import signal; raise SystemExit(signal.SIG_IGN in map(signal.getsignal, (signal.SIGHUP, signal.SIGINT)))"
PYTEST = f"import subprocess, sys, tests.conftest; sys.exit(subprocess.call([sys.executable, '-c', {CHILD!r}]))"


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("code", "status"), [(CHILD, 1), (PYTEST, 0)], ids=["inherited", "restored"])
def test_children_heed_signals_that_pytest_was_started_to_ignore(code: str, status: int) -> None:
    ignoring = 'trap "" HUP INT; exec "$0" "$@"'  # as `nohup`, and a shell that starts a job in the background
    done = subprocess.run(["sh", "-c", ignoring, sys.executable, "-c", code], check=False, cwd=ROOT, timeout=100)
    assert done.returncode == status
