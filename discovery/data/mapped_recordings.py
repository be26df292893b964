"""Recordings in a file that any number of processes can map into memory without copying.

The file is read by unpickling, so only processes of the same run may use it.
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
    """Write `recordings` to `path` and an index to a second file; return `path`. They must not have been replayed."""
    buffers: list[pickle.PickleBuffer] = []
    index = pickle.dumps(list(recordings), protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    with path.open("wb") as file:
        for view in raw:
            file.write(view)
    cuts = list(itertools.accumulate((view.nbytes for view in raw), initial=0))
    _index_path(path).write_bytes(pickle.dumps((index, cuts)))
    return path


@lru_cache(maxsize=2)
def load_mapped(path: Path) -> list[Recording]:
    """Return the recordings written to `path`; their arrays are read-only views of it. The last results are cached."""
    index, cuts = pickle.loads(_index_path(path).read_bytes())
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    recordings: list[Recording] = pickle.loads(index, buffers=[content[b:e] for b, e in itertools.pairwise(cuts)])
    return recordings


def _index_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")
