"""Explorer that proposes the controller files in a folder."""

from __future__ import annotations

import re
from pathlib import Path

from controllers.errors import BadController
from controllers.loading import read_source
from discovery.errors import ExplorerError
from discovery.search.explorers import Candidate, ExplorerContext
from discovery.search.prompt import NAME, clean


class Files:
    """Proposes every `*.py` of a folder that was not proposed before, in order of names; implements `Explorer`.

    A file that cannot be read is proposed as a candidate that only holds the error. It fails, and the file is proposed
    again once it is repaired.
    """

    name = "files"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """Return the new files, if any. Raises ExplorerError if the folder cannot be read."""
        try:
            paths = sorted(path for path in self._folder.iterdir() if path.suffix == ".py" and not path.is_dir())
        except OSError as error:
            raise ExplorerError(f"{self._folder}: {error.strerror}") from None
        known = {standing.candidate.digest for standing in context.standings}
        made: list[Candidate] = []
        for path in paths:
            candidate = self._read(path)
            if candidate.digest not in known:
                known.add(candidate.digest)
                made.append(candidate)
        return made

    def _read(self, path: Path) -> Candidate:
        try:
            source, note = read_source(path), ""
        except BadController as error:
            note = clean(str(error).replace(str(path), path.name))
            source = f"# {note}\n"
        return Candidate(clean_name(path.stem), source, self.name, note=note)


def clean_name(text: str) -> str:
    """Return `text` with characters that candidate names cannot have replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[:NAME] or "_"
