"""Probe suffixes at earlier points of ended branches, which depend on the text up to each point.

While a branch's thought is open, all its suffixes are equal. So only the text around the end of the thought is decoded,
which takes one or two requests per branch.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy.environment.branch_generator import BranchGenerator
from proxy.types import LiveBranch


class PastSuffixes:
    """Suffixes for late probes of one request's branches."""

    def __init__(self, generator: BranchGenerator, branches: Sequence[LiveBranch]) -> None:
        self._generator = generator
        self._branches = branches
        self._thoughts: dict[int, range] = {}  # by branch: numbers of intervals after which its thought is open

    async def at(self, index: int, intervals: int) -> list[int]:
        """Return the ids that a probe appends to branch `index` after its first `intervals` intervals."""
        if index not in self._thoughts:
            self._thoughts[index] = await self._find_thought(index)
        if intervals not in self._thoughts[index]:
            return await self._generator.suffix(await self._text(index, intervals), lead=True)
        prompt = self._generator.prompt
        open_suffix = prompt.template.close + prompt.template.lead
        return await self._generator.engine.tokenise_suffix(prompt.model, open_suffix)

    async def _find_thought(self, index: int) -> range:
        """Return the numbers of intervals after which the thought of a branch is open.

        It is empty if the thought is not open after the first interval.
        """
        branch, template = self._branches[index], self._generator.prompt.template
        last = (len(branch.ids) - 1) // self._generator.limits.interval
        if not self._is_thinking("") and not self._is_thinking(await self._text(index, 1)):
            return range(0)
        while last > 0 and template.ending in branch.text and not self._is_thinking(await self._text(index, last)):
            last -= 1
        return range(1, last + 1)

    def _is_thinking(self, text: str) -> bool:
        return self._generator.prompt.template.thinking(self._generator.prompt.tail, text)

    async def _text(self, index: int, intervals: int) -> str:
        """Return the text of a branch's first `intervals` intervals."""
        ids = self._branches[index].ids[: intervals * self._generator.limits.interval]
        return await self._generator.detokeniser.visible(ids)
