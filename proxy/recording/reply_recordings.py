"""Record whole replies of the upstream: the length of each, and the class of its vote.

A reply cannot be probed or continued once it was cut. So only episodes whose replies all ended become recordings.
"""

from __future__ import annotations

from controllers import State, Stop
from discovery.data.recordings import RecordedBranch
from proxy.environment.reply_environment import ReplyEnvironment
from proxy.types import Plan


def is_recordable(plan: Plan, environment: ReplyEnvironment, state: State) -> bool:
    """Return whether a served episode suits a recording: its replies ended by themselves, and can be compared later."""
    request = environment.request
    if not request.is_replayable or plan.records_all or plan.ignores_eos or plan.prompt.stop:
        return False
    is_ended = state.stop in (Stop.ANSWERED, Stop.MAX_TOKENS) and bool(environment.branches)
    return is_ended and all(
        reply.is_complete and (reply.finish == "stop" or reply.call.max_tokens >= request.branch_tokens)
        for reply in environment.branches
    )


async def recorded_replies(environment: ReplyEnvironment) -> list[RecordedBranch]:
    """Return the replies in the order in which they were opened. Those that have not ended are censored."""
    recorded: list[RecordedBranch] = []
    for index, reply in enumerate(environment.branches):
        label = await environment.read_finished(index)
        final = None if label is None else environment.labels.recorded(label)
        recorded.append(RecordedBranch((), len(reply.ids), final, complete=reply.is_complete))
    return recorded
