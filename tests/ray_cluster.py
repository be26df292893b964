"""A real Ray cluster of two nodes with a processor each, for tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from discovery.ray_cluster import socket_folder

OBJECT_STORE = 100 << 20
"""Bytes of a node's object store, about the least that Ray accepts."""


def need_ray() -> None:
    """Skip a test without Ray."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed; `make test` installs it")


@contextmanager
def running_cluster() -> Iterator[str]:
    """Start a cluster, yield its address, and stop it. It listens on 127.0.0.1 only, by an environment variable."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray-", dir=socket_folder(), ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        cluster = Cluster()
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE, include_dashboard=False)
            yield str(cluster.address)
        finally:
            cluster.shutdown()
            del os.environ["RAY_TMPDIR"]


def worker_processes(title: str = "ray::") -> list[int]:
    """Return the process ids of the workers, idle or not, of this process's cluster whose titles begin with `title`."""
    workers = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes().partition(b"\0")[0].decode()
            raylet = Path("/proc", (path / "stat").read_text().rpartition(")")[2].split()[1])
            parent = int((raylet / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if name.startswith(title) and "Agent" not in name and parent == os.getpid():
            workers.append(int(path.name))
    return sorted(workers)
