"""The vote of an episode that its deadline cut before any vote: that of the branches that ended in the cut round."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from contextlib import suppress

from controllers import State, Stop
from controllers.voting import plurality, tally
from discovery.answers import Labels
from proxy.environment.live_environment import LiveEnvironment
from proxy.types import LiveBranch


def is_without_vote(state: State) -> bool:
    """Return whether the deadline ended an episode before anything could vote."""
    return state.stop is Stop.DEADLINE and state.answer is None


def branches_with_leading_label(state: State, labels: Mapping[int, int | None]) -> Collection[int]:
    """Return the branches with the plurality of `labels`, given by branch. Empty if no branch has one.

    As in `State.deciding_votes`, pruned branches do not vote. Of equal counts, the label of the first branch leads.
    """
    voting = {
        index: label
        for index, label in sorted(labels.items())
        if index >= state.width or not state.branches[index].pruned
    }
    leader = plurality(tally(voting.values()))
    return [] if leader is None else [index for index, label in voting.items() if label == leader]


async def read_ended_branches(environment: LiveEnvironment, timeout_s: float | None) -> Mapping[int, int | None]:
    """Return the labels of the branches that ended by themselves, as far as they can be read in `timeout_s`.

    No request is sent to the upstream, so a reply that a stop string cut before its answer has no label. Neither the
    branches nor the labels of the request change, because bills and records are made from them.
    """
    own_labels, labels = Labels(), dict[int, int | None]()
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            for index, branch in enumerate(environment.branches):
                if branch.finish == "stop":
                    labels[index] = await _read_label(environment, branch, own_labels)
    return labels


async def _read_label(environment: LiveEnvironment, branch: LiveBranch, labels: Labels) -> int | None:
    answer = branch.answer
    if not branch.is_read:
        prompt = environment.prompt
        answer = await environment.grader.read(prompt.template.split(prompt.tail, branch.text)[1], prompt.kind)
    return await environment.number(answer, labels)
