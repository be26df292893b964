"""Files of a search in the folder of its run, which must replace no file that somebody else wrote."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from discovery.data.safe_json import parse_json
from discovery.errors import FileWriteError, HistoryError
from discovery.search.explorers import Candidate
from discovery.search.history import History
from discovery.search.prompt import HEADING

log = logging.getLogger(__name__)

_DIGITS: Final = 12
"""Digits of the digest in the name of a controller's file, if the plain name is taken."""


def check_new_run(record: Path, others: Iterable[Path]) -> None:
    """Check, before any work, that a new run with this record would replace neither a run nor one of the other files.

    An empty file or folder may be there. Raises HistoryError or FileWriteError, which names the file.
    """
    History.check_unused(record)
    for path in others:
        if _has_content(path):
            raise _refusal(path)


def check_resumed_run(context: Path) -> None:
    """Check, before any work, that a search wrote its context at this path, if it is there. Raises FileWriteError."""
    try:
        is_own = not _has_content(context) or context.read_text().startswith(HEADING)
    except (OSError, ValueError):
        is_own = False
    if not is_own:
        raise _refusal(context)


def controller_file(folder: Path, history: History, winner: Candidate, tried: Sequence[Candidate]) -> Path:
    """Return the file in `folder` for the winner of a run; its card gets the same name with `.json`.

    It is named like the winner, and with the beginning of its digest if a file of that name, or a card, is not of this
    run. Raises FileWriteError if both names are taken.
    """
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in winner.name)[:64]
    paths = [folder / f"{name}.py" for name in (stem, f"{stem}-{winner.digest[:_DIGITS]}")]
    digests = {candidate.digest for candidate in tried}
    free = next((path for path in paths if _is_of_run(path, history, winner, digests)), None)
    if free is None:
        raise FileWriteError(
            f"{paths[0]} and {paths[1]}: files of these names, or their cards, exist, and this search did not write "
            "them; move them away, then continue with --resume"
        )
    if free != paths[0]:
        log.warning("%s, or its card, is not of this search; the controller is written to %s instead", paths[0], free)
    return free


def winner_file(record: Path) -> Path:
    """Return the file of the winner that a run chose last; winners of before it was resumed may be beside it.

    Raises HistoryError if the run has chosen none, or its file and card are not in the folder of the record.
    """
    history = History.read(record)
    chosen = history.bodies("chosen")
    if not chosen:
        raise HistoryError(f"{record}: the search has not chosen a winner; continue it with --resume")
    digest = chosen[-1]["digest"]
    for path in sorted(record.parent.glob("*.py")):
        is_winner = path.is_file() and sha256(path.read_bytes()).hexdigest() == digest
        if is_winner and _card_digest(path.with_suffix(".json"), history) == digest:
            return path
    raise HistoryError(f"{record.parent}: the winner's file or card is missing; write it again with --resume")


def _is_of_run(path: Path, history: History, winner: Candidate, digests: set[str]) -> bool:
    """Return whether this run wrote the controller's file at `path` and its card, as far as they exist."""
    card = path.with_suffix(".json")
    digest = _card_digest(card, history)
    if os.path.lexists(card) and digest not in digests:
        return False
    if not os.path.lexists(path):
        return True
    try:
        return sha256(path.read_bytes()).hexdigest() in (winner.digest, digest)
    except OSError:
        return False


def _card_digest(path: Path, history: History) -> str | None:
    """Return the digest in a card that a run with these settings wrote; None if there is no such card."""
    try:
        card: Any = parse_json(path.read_bytes())
        settings, digest = card["settings"], card["digest"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    begun = history.bodies("begun")[0]
    is_of_run = isinstance(settings, Mapping) and all(settings.get(name) == begun[name] for name in begun)
    return str(digest) if is_of_run else None


def _refusal(path: Path) -> FileWriteError:
    return FileWriteError(f"{path}: this search did not write it; move it away, or name another folder with --out")


def _has_content(path: Path) -> bool:
    """Return whether something is lost if `path` is replaced. Nothing is if it is empty, or does not exist."""
    if path.is_symlink() or not path.exists():
        return path.is_symlink()
    if path.is_dir():
        return any(path.iterdir())
    return not path.is_file() or path.stat().st_size > 0
