"""Recordings laid out in a file that any number of processes map and none copies.

The file is for this run of this program alone: it is unpickled.
"""

from __future__ import annotations

import itertools
import mmap
import pickle
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from discovery.data.recordings import Recording


def write_mapped(recordings: Sequence[Recording], path: Path) -> Path:
    """Write `recordings`, not replayed yet, to `path` and beside it; returns `path`."""
    buffers: list[pickle.PickleBuffer] = []
    index = pickle.dumps(list(recordings), protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    with path.open("wb") as file:
        for view in raw:
            file.write(view)
    cuts = list(itertools.accumulate((view.nbytes for view in raw), initial=0))
    _beside(path).write_bytes(pickle.dumps((index, cuts)))
    return path


@lru_cache(maxsize=2)
def load_mapped(path: Path) -> list[Recording]:
    """The recordings shelved at `path`, their arrays read-only views of it. The last few asked for stay at hand."""
    index, cuts = pickle.loads(_beside(path).read_bytes())
    with path.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    recordings: list[Recording] = pickle.loads(index, buffers=[whole[b:e] for b, e in itertools.pairwise(cuts)])
    return recordings


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")
