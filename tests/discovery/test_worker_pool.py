"""Worker processes of a search end with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from discovery.data.importers import format_recording_line
from discovery.worker_pool import LONGEST_FOLDER, make_worker_pool
from tests.discovery.search.test_loop import PLANTED

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]
PATIENCE_S = 60


def until(is_done: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not is_done():
        assert time.monotonic() < ends
        time.sleep(0.02)  # no event announces what another process does


def parents() -> dict[int, int]:
    """Return the parent of each process that has not ended; zombies have."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if folder.name.isdigit() and state != "Z":
            found[int(folder.name)] = int(parent)
    return found


def descendants(process: int) -> set[int]:
    running, found, size = parents(), {process}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in running.items() if parent in found}
    return found - {process}


def has_worker(search: int) -> bool:
    """Return whether a process has been forked from a child of the search."""
    running = parents()
    return any(running.get(parent) == search for parent in running.values())


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary folder whose path, other than that of `tmp_path`, is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def running_search(folder: Path, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a search of several minutes in `folder`. Its processes are killed at the end if they still run."""
    (folder / "lines.jsonl").write_text("".join(map(format_recording_line, PLANTED)))
    options = "--no-kernel --minutes 9 --workers 2 --recordings lines.jsonl --out run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "proxy.cli", "discover", *options.split()]
    with (
        open(folder / "output", "w") as output,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output) as running,
    ):
        try:
            yield running
        finally:
            for process in descendants(running.pid):
                os.kill(process, signal.SIGKILL)
            running.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_search_that_is_killed_leaves_no_process(tmp_path: Path, scratch: Path, number: signal.Signals) -> None:
    with running_search(tmp_path, scratch) as running:
        until(lambda: has_worker(running.pid) or running.poll() is not None)
        assert running.poll() is None, (tmp_path / "output").read_text()
        workers = descendants(running.pid)
        running.send_signal(number)
        status = running.wait(PATIENCE_S)
        until(lambda: not workers & parents().keys())
    if number is signal.SIGTERM:
        assert status == 128 + number
        assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("length", [LONGEST_FOLDER, LONGEST_FOLDER + 1])
def test_a_temporary_folder_too_long_for_sockets_is_named(scratch: Path, length: int) -> None:
    folder = scratch / ("x" * (length - len(str(scratch)) - 1))
    folder.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", "import tests.discovery.test_worker_pool as module; module.use_a_pool()"],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TMPDIR": str(folder)},
        text=True,
        timeout=PATIENCE_S,
    )
    if length == LONGEST_FOLDER:
        assert (ended.returncode, ended.stdout) == (0, "made\n"), ended.stderr
    else:
        assert ended.stderr.strip().splitlines()[-1] == (
            f"discovery.errors.EngineError: TMPDIR: '{folder}' is too long for the sockets of worker processes; "
            "set it to a folder of at most 71 bytes, such as /tmp"
        )


def use_a_pool() -> None:
    with make_worker_pool(1, []) as pool:
        assert pool.submit(os.getppid).result() != os.getpid()
    sys.stdout.write("made\n")
