"""Rendezvous hashing: an order of nodes for each key, which changes least when a node comes or goes.

Each node gets a number from the key and its own name, and the node with the largest number comes first. A key therefore
moves only if its first node leaves, or if a new node comes first for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def ranked(key: bytes, nodes: Iterable[T], name: Callable[[T], str]) -> list[T]:
    """Return the nodes in the order in which they take requests with this key. `name` identifies a node."""
    return sorted(nodes, key=lambda node: (_weight(key, name(node)), name(node)), reverse=True)


def _weight(key: bytes, name: str) -> bytes:
    return blake2b(name.encode(), key=blake2b(key, digest_size=32).digest(), digest_size=8).digest()
