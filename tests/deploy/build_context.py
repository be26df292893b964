"""The build context of the Dockerfile: the files that .dockerignore lets in, and the wheel made of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from tests.readability import ROOT

HIDDEN: Final = {".git", ".venv", "build", "dist", "__pycache__"}
"""Folders that are large or made by tools. `is_in_context` refuses their files too; walking through them takes long."""


def is_in_context(path: str) -> bool:
    """Return whether .dockerignore lets a file in. The last pattern that matches it, or a folder of it, decides."""
    is_in = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(_matches(part, pattern) for part in (path, *map(str, Path(path).parents))):
                is_in = line.startswith("!")
    return is_in


def _matches(path: str, pattern: str) -> bool:
    """Match as Docker does: `*` stays in one folder, and a leading `**/` stands for any folders."""
    if pattern.startswith("**/"):
        return fnmatch(Path(path).name, pattern.removeprefix("**/"))
    return path.count("/") == pattern.count("/") and fnmatch(path, pattern)


def context() -> Iterator[str]:
    """Yield the files of the context, relative to the checkout."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in HIDDEN]
        for name in files:
            path = str((Path(folder) / name).relative_to(ROOT))
            if is_in_context(path):
                yield path


def install(target: Path, workshop: Path) -> None:
    """Build the wheel from the context alone, as the Dockerfile does, and unpack it into `target`."""
    tree = workshop / "context"
    for path in context():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tree / path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(workshop / "wheels")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    (wheel,) = (workshop / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(target)
