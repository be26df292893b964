"""Ray: connect to a running cluster, or start a local one, and run tasks there. `ray` is an optional dependency.

Ray's dashboard and usage statistics stay off. A local cluster listens on 127.0.0.1 only, and its files are deleted.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from controllers.errors import ControllersError
from discovery.errors import DiscoveryError, EngineError, install_hint
from discovery.worker_pool import translate_errors

log = logging.getLogger(__name__)

RAYS_OWN: Final = "/tmp"
"""Folder that Ray itself would choose. A folder with a random name is made in it."""
LONGEST_FOLDER: Final = 23
"""Bytes of the longest temporary folder.

A Unix socket's path has at most 107 bytes, of which this module appends 17, and Ray up to 67.
"""
CONNECT_S: Final = 10.0
"""Seconds that a cluster may take to accept a connection. Ray itself would try for two minutes."""
RETRIES: Final = 3
"""Times that Ray runs a task again whose worker or node was lost."""
TOKEN_FILE: Final = Path("~/.ray/auth_token")
"""File with the token of the user's clusters, by Ray's convention."""
ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("controllers", "discovery")
"""Packages that tasks use, which must be the same on every node."""


@contextmanager
def ray_connection(address: str | None, workers: int) -> Iterator[int]:
    """Connect to the cluster at `address` and yield its number of processors; end the connection afterwards.

    Without an address, a local cluster of so many `workers` is started and stopped. An existing connection is used as
    it is. Raises EngineError.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if "ray" not in sys.modules:  # it reads these variables when it is imported
        if address is None:
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # makes a local cluster listen on 127.0.0.1 only
        _choose_authentication(address)
    try:
        import ray
    except ImportError:
        raise EngineError(f"--engine ray needs Ray: {install_hint('ray')}") from None
    with ExitStack() as stack:
        if not ray.is_initialized():
            options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
            if address is None:
                options |= {"address": "local", "num_cpus": workers, "include_dashboard": False}
                options["_temp_dir"] = stack.enter_context(_temporary_folder())
            else:
                _check_reachable(address)
                options["address"] = address
            stack.callback(ray.shutdown)  # before connecting: also if that fails half-way
            try:
                ray.init(**options)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
                raise EngineError(f"cannot use Ray{_at(address)}: {str(error).partition(chr(10))[0]}") from None
        _redirect_messages()
        yield max(1, int(ray.cluster_resources().get("CPU", 1)))


def _choose_authentication(address: str | None) -> None:
    """Let Ray authenticate by a token: a new one for a local cluster, otherwise the user's, if there is one.

    Left alone, Ray would save a token in the home folder, and `ray start` would demand it, but no client would send it.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or TOKEN_FILE.expanduser().exists()
    if has_token:
        os.environ["RAY_AUTH_MODE"] = "token"


def _redirect_messages() -> None:
    """Log what Ray would print to standard output, where figures may be written as JSON.

    This replaces a private function of Ray, which has no setting for it. A version without it prints as it likes.
    """
    module = sys.modules.get("ray._private.worker")
    if module is not None and hasattr(module, "print_to_stdstream"):
        vars(module)["print_to_stdstream"] = _log_messages


def _log_messages(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    for line in data["lines"]:
        log.warning("Ray: %s", line.partition(". ")[0])


def _at(address: str | None) -> str:
    if address is None:
        return ""
    return f" at --address {address} (if it demands a token, put the token into RAY_AUTH_TOKEN or {TOKEN_FILE})"


def _check_reachable(address: str) -> None:
    """Raise EngineError if `address` is not HOST:PORT, or nothing accepts a connection there."""
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise EngineError(
            f"--address {address}: not HOST:PORT; give the address that `ray start --head` printed, such as "
            "127.0.0.1:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise EngineError(
            f"--address {address}: no Ray cluster answers there ({error.strerror or error}); start one with "
            "`ray start --head`, or leave --address out to use a local one"
        ) from None


def socket_folder() -> str:
    """Return a folder short enough for Ray's sockets: that of TMPDIR, or else /tmp. Raises EngineError."""
    folder = tempfile.gettempdir()
    for each in (folder, RAYS_OWN):
        if len(os.fsencode(each)) <= LONGEST_FOLDER and os.access(each, os.W_OK):
            return each
    raise EngineError(
        f"TMPDIR: {folder!r} is too long for the sockets of Ray; set it to a folder of at most {LONGEST_FOLDER} bytes"
    )


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """Yield a new folder, short enough for Ray's sockets, which is deleted afterwards. Raises EngineError."""
    with tempfile.TemporaryDirectory(prefix="autotts-", dir=socket_folder(), ignore_cleanup_errors=True) as own:
        yield own


@cache
def code_digest() -> str:
    """Return a digest of the code that tasks run."""
    digest = sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def check_code(digest: str) -> None:
    """Raise EngineError in a task if its node has other code than the process that submitted it."""
    if digest != code_digest():
        raise EngineError(
            f"the code of autotts-proxy on Ray's node {socket.gethostname()} differs from this machine's; install the "
            "same version on every node, and restart Ray there"
        )


def future_of(reference: Any) -> Future[Any]:
    """Return a future of a Ray task's result. Its exception is the task's own, or EngineError if Ray failed."""
    return translate_errors(reference.future(), own_error)


def own_error(error: BaseException) -> BaseException:
    """Return the error of this project behind an error that Ray raises; EngineError for errors of Ray itself."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DiscoveryError | ControllersError):
        return cause
    if isinstance(cause, ImportError):
        return EngineError(
            f"Ray's workers cannot import autotts-proxy ({cause}); install the same version on every node, and restart "
            "Ray there"
        )
    if isinstance(cause, Exception):
        return cause
    text = " ".join(str(error).split())
    return EngineError(f"Ray lost a task {RETRIES + 1} times or cannot run it: {type(error).__name__}: {text[:500]}")
