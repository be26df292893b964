"""Build the sdist and the wheel from the checkout's files, and list what they must contain."""

from __future__ import annotations

import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Final, NamedTuple

from tests.packaging.installation import PIP, run_command
from tests.readability import PACKAGES, ROOT

NOT_COPIED: Final = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "*.db*", "extensions")
FILES: Final = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "constraints.txt",
    "tests",
)
LIMIT_S: Final = 300
"""Time limit of a build."""
STATIC: Final = ROOT / "proxy" / "ui" / "static"


class Distributions(NamedTuple):
    """The two files of a release."""

    sdist: Path
    wheel: Path

    def sdist_names(self) -> set[str]:
        """Return the files of the sdist, relative to its one folder."""
        with tarfile.open(self.sdist) as opened:
            return {name.partition("/")[2] for name in opened.getnames()}

    def wheel_names(self) -> set[str]:
        """Return the files of the wheel."""
        with zipfile.ZipFile(self.wheel) as opened:
            return set(opened.namelist())

    def metadata(self) -> str:
        """Return the wheel's metadata."""
        with zipfile.ZipFile(self.wheel) as opened:
            (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
            return opened.read(name).decode()


def build(folder: Path, *, isolated: bool = False) -> Distributions:
    """Build into `folder`: the sdist from a copy of the checkout, and the wheel from the sdist.

    With `isolated`, the build's own requirements are downloaded; otherwise those of this environment are used.
    """
    tree = folder / "tree"
    tree.mkdir()
    for name in (*PACKAGES, *FILES):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=NOT_COPIED)
        else:
            shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(tree)]
    run_command([*command, *([] if isolated else ["--no-isolation"])], folder, timeout_s=LIMIT_S)
    shutil.rmtree(tree)
    (sdist,), (wheel,) = folder.glob("autotts_proxy-*.tar.gz"), folder.glob("autotts_proxy-*.whl")
    return Distributions(sdist, wheel)


def build_from_git(folder: Path) -> Path:
    """Return the wheel that `pip install git+file://CHECKOUT` installs: of the latest commit."""
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    run_command([*PIP, "wheel", *options, f"git+file://{ROOT}"], folder, timeout_s=LIMIT_S)
    (wheel,) = folder.glob("autotts_proxy-*.whl")
    return wheel


def required_files() -> set[str]:
    """Return the files that an installation needs: modules, pages, the embedded model, its champion, and cards."""
    modules = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    pages = {path for folder in ("templates", "static") for path in (STATIC.parent / folder).rglob("*.*")}
    embedded = {path for folder in ("model", "champion") for path in (ROOT / "deploy/embedded" / folder).glob("*.*")}
    typed = {ROOT / package / "py.typed" for package in PACKAGES if (ROOT / package / "py.typed").exists()}
    cards = set((ROOT / "controllers" / "discovered").glob("*.json"))
    return {str(path.relative_to(ROOT)) for path in modules | pages | embedded | typed | cards}


def vendored_licences() -> set[str]:
    """Return the licences and notices of files that other projects wrote."""
    vendor = STATIC / "vendor"
    return {str(path.relative_to(ROOT)) for kind in ("LICENSE", "NOTICE") for path in vendor.glob(f"*{kind}*")}
