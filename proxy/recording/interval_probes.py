"""Record all branches of a request: once they have ended, probe them after each of their intervals.

Branches run to their ends without pauses, and many probes share a call. Each branch has its own labels, so its record
does not depend on the other branches of the request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from controllers import Limits, Probed
from discovery.answers import Labels
from discovery.data.recordings import RecordedBranch
from proxy.environment.live_environment import LiveEnvironment
from proxy.recording.recorded_branches import BranchProgress, recorded_branch

MIN_PROBES: Final = 16
"""Probes that share a call even if the request has fewer branches."""
MAX_PROMPT_TOKENS: Final = 2**18
"""Maximum prompt tokens of a call with several probes."""

Point = tuple[int, int]
"""A branch, and the number of whole intervals after which it is probed."""


class IntervalProbes:
    """Late probes of all branches that one request records."""

    def __init__(self, environment: LiveEnvironment, limits: Limits) -> None:
        self._environment = environment
        self._limits = limits
        self._labels: defaultdict[int, Labels] = defaultdict(Labels)  # by branch
        self._probes: dict[Point, Probed] = {}

    async def run(self) -> bool:
        """Probe the finished branches. Return False if the token cap left some probes out. May raise UpstreamError."""
        environment = self._environment
        for index, branch in enumerate(environment.branches):
            if branch.finish is not None:
                await environment.read_finished(index)
        points = self._points()
        if not environment.prompt.kind.is_probeable:
            self._probes |= {point: Probed(point[0], None, 0) for point in points}
            return True
        while points:
            group = points[: self._fitting(points)]
            if not group:
                return False
            results = await environment.probe_at(group, {index: self._labels[index] for index, _ in group})
            self._probes.update(zip(group, results, strict=True))
            points = points[len(group) :]
        return True

    async def branches(self) -> list[RecordedBranch]:
        """Return all branches. Those that have not finished or lack a probe are censored."""
        recorded: list[RecordedBranch] = []
        for index, branch in enumerate(self._environment.branches):
            labels = self._labels[index]
            is_finished = branch.finish == "length" or (branch.finish is not None and branch.is_read)
            label = await self._environment.number(branch.answer, labels) if is_finished else None
            progress = BranchProgress(self._intervals(index), len(branch.ids), is_finished, label)
            recorded.append(recorded_branch(self._environment, labels, index, progress, self._probes))
        return recorded

    def _points(self) -> list[Point]:
        """Return the points at which finished branches have no probe yet, branch by branch."""
        return [
            (index, intervals)
            for index, branch in enumerate(self._environment.branches)
            if branch.finish is not None
            for intervals in range(1, self._intervals(index))
            if (index, intervals) not in self._probes
        ]

    def _intervals(self, index: int) -> int:
        """Return how many intervals a branch has run. The last may be shorter."""
        return max(1, -(-len(self._environment.branches[index].ids) // self._limits.interval))

    def _fitting(self, points: Sequence[Point]) -> int:
        """Return how many of the first `points` may share the next call. It is 0 if the token cap leaves no room."""
        environment, limits = self._environment, self._limits
        most = max(MIN_PROBES, len(environment.branches))  # probes then take no more slots than the branches did
        if limits.max_tokens is not None:
            most = min(most, max(0, limits.max_tokens - environment.meter.billed) // max(1, limits.probe_tokens))
        size = count = 0
        for _, intervals in points[:most]:
            size += len(environment.prompt.ids) + intervals * limits.interval + limits.probe_tokens
            if count and size > MAX_PROMPT_TOKENS:
                break
            count += 1
        return count
