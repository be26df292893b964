"""Traces of a candidate's worst questions: some recordings of the search split are played again, and digested.

    python -m proxy.ui.sources.worst_questions STORE FOLDER DIGEST

A process of its own does this, so that requests do not wait for the interpreter. The candidate runs sealed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from controllers.errors import ControllersError
from controllers.loading import Spec
from controllers.sandbox.deadline import Clock
from controllers.signals import parse_signals
from discovery.answers import Judge
from discovery.commands.discover import RECORD
from discovery.data.traces import trace_files
from discovery.errors import DiscoveryError
from discovery.evaluation.evaluate import AnswerComparison, read_scorable_cell
from discovery.evaluation.replay_jobs import Job, ReplayRules, Sealing, run_job
from discovery.evaluation.sources import open_source
from discovery.search.cascade import BASELINE
from discovery.search.history import History
from discovery.search.loop import read_pairs
from discovery.search.trace_digest import digest_traces
from discovery.store import StorePlace, parse_place
from proxy.errors import ApiError
from proxy.ui.sources.job_process import end_with_parent
from proxy.ui.sources.jobs import inherited_environment

BETAS: Final = (0.5, 1.0)
MOST_QUESTIONS: Final = 100
"""Questions of each cell that are played, evenly spread."""
LIMIT_S: Final = 120.0
_WRONG: Final = 3  # exit status with a message for the page


async def worst_questions(store: StorePlace, folder: Path, digest: str) -> str:
    """Return the digest of a candidate's traces, from a process. Raises ApiError with the reason if there is none."""
    arguments = ("-m", "proxy.ui.sources.worst_questions", str(store), str(folder), digest)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=inherited_environment(store),
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise ApiError(f"replaying took longer than {LIMIT_S:g} s; use fewer recordings", code="too_slow") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()  # `wait` alone may leave the pipe open
    text = output.decode(errors="replace")
    if process.returncode:
        raise ApiError(f"it cannot be replayed: {text or 'the process failed'}", code="unreadable_record")
    return text


def digest_worst(store: StorePlace, folder: Path, digest: str) -> str:
    """Play a candidate as its run did, on recordings of the search split, and describe its worst episodes.

    Raises DiscoveryError, ControllersError, and KeyError or ValueError for a history of another version.
    """
    history = History.read(folder / RECORD)
    candidate = next(each for each, _ in read_pairs(history) if each.digest == digest)
    spec = Spec(candidate.name, None if candidate.explorer == BASELINE else candidate.source)
    settings = history.bodies("begun")[0]
    wanted = set(settings["cells"])
    source, played = open_source(store), {}
    with Judge(clock=Clock.CPU) as judge:
        for cell in source.cells():
            if " ".join(cell) in wanted:
                recordings, _ = read_scorable_cell(source, cell, AnswerComparison.AUTO, judge)
                played[cell] = recordings[:: -(-len(recordings) // MOST_QUESTIONS)]
    if not played:
        return "The store has no recordings of the questions that this run was tried on."
    with tempfile.TemporaryDirectory(prefix="autotts-") as traces:
        rules = ReplayRules(
            probe_tokens=settings["probe_tokens"],
            signals=parse_signals(settings["signals"]),
            traces=Path(traces),
            sealing=Sealing.FOREIGN,
        )
        for cell, recordings in played.items():
            for beta in BETAS:
                run_job(Job(spec, beta, cell, range(1)), recordings, rules)
        return digest_traces(trace_files(Path(traces)), played)


def main() -> int:
    """Write the digest to the standard output, or a reason and a status other than 0."""
    end_with_parent()
    store, folder, digest = sys.argv[1:]
    try:
        sys.stdout.write(digest_worst(parse_place(store), Path(folder), digest))
    except (DiscoveryError, ControllersError) as error:
        sys.stdout.write(str(error))
        return _WRONG
    except (KeyError, ValueError):
        sys.stdout.write("another version of autotts wrote the history of this run")
        return _WRONG
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
