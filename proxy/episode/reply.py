"""Compose the reply to the client from a finished episode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from controllers import State, Stop
from discovery.data.recordings import RecordedBranch
from proxy import probe_templates
from proxy.environment.live_environment import LiveEnvironment
from proxy.episode.bill import token_bill, usage
from proxy.episode.tts_object import tts_object
from proxy.errors import DeadlinePassed, UpstreamError
from proxy.types import LiveBranch, Message, Plan, Reply

logger = logging.getLogger(__name__)

INTERRUPTED: Final = (Stop.DEADLINE, Stop.MAX_TOKENS, Stop.UPSTREAM_ERROR, Stop.CONTROLLER_ERROR)
"""Stop reasons of episodes that end before their vote. The message may give an answer that no branch voted for."""
GREEDY: Final = {"temperature": 0.0}
"""Sampling parameters of the final answer."""


async def compose_reply(
    plan: Plan,
    environment: LiveEnvironment,
    state: State,
    recorded: Sequence[RecordedBranch] = (),
    fallback: str | None = None,
    escalated_beta: float | None = None,
    timeout_s: float | None = None,
) -> Reply:
    """Return the reply to an ended episode that has at least one branch. May raise UpstreamError.

    `recorded` are the branches if the plan records all. `fallback` is the reason why the baseline decided, or None.
    `escalated_beta` is the β at which the episode continued, or None. If the upstream does not answer within
    `timeout_s`, or fails after the deadline or in a recording, the reply has the text that was generated so far.
    """
    completed = environment.meter.completed
    index = _select_branch(environment, state)
    try:
        async with asyncio.timeout(timeout_s):
            message, agreed = await _finished_message(plan, environment, index, state)
    except TimeoutError:
        message, agreed = _message_as_is(plan, environment, index, state)
    except UpstreamError as error:
        if state.stop is not Stop.DEADLINE and not plan.records_all:
            raise
        logger.warning("%s: %s", plan.request_id, error.logged)
        message, agreed = _message_as_is(plan, environment, index, state)
    reads_answer = state.answer is not None or state.stop in INTERRUPTED
    answer = await environment.grader.read(message.content, plan.prompt.kind) if reads_answer else None
    tokens = token_bill(environment, state, index, environment.meter.completed - completed)
    return Reply(
        plan=plan,
        message=message,
        tokens=tokens,
        usage=usage(environment.meter, len(plan.prompt.ids), message.visible_tokens),
        tts=tts_object(
            plan,
            environment,
            state,
            answer,
            label=state.answer,
            agreed=agreed,
            tokens=tokens,
            fallback=fallback,
            escalated_beta=escalated_beta,
            recorded=recorded,
        ),
    )


def deadline_error() -> DeadlinePassed:
    """Return the error of a request whose deadline passed before any token was generated."""
    message = "the deadline passed before the first token; raise tts.deadline_s, or ask again later"
    return DeadlinePassed(message, param="tts.deadline_s", code="deadline_passed")


def _select_branch(environment: LiveEnvironment, state: State) -> int:
    """Return the index of the branch whose text the client reads.

    With an answer, this is the shortest finished branch with that answer. If there is none, it is the longest branch
    whose latest probe gave that answer: running branches come first, then branches that were not pruned. Without an
    answer, it is the longest branch that finished, or else the longest branch.
    """
    branches, answer = environment.branches, state.answer
    if answer is None:
        return max(range(len(branches)), key=lambda i: (branches[i].finish == "stop", len(branches[i].ids)))
    finished = [i for i, branch in enumerate(branches) if branch.finish is not None and branch.label == answer]
    if finished:
        return min(finished, key=lambda i: len(branches[i].ids))
    leaning = [i for i, branch_state in enumerate(state.branches) if branch_state.label == answer]
    return max(
        leaning or range(len(branches)),
        key=lambda i: (
            branches[i].finish is None,
            not (i < state.width and state.branches[i].pruned),
            len(branches[i].ids),
        ),
    )


async def _finished_message(plan: Plan, environment: LiveEnvironment, index: int, state: State) -> tuple[Message, bool]:
    """Return the message of branch `index`, and whether it agrees with the vote.

    A branch that has not finished is made to answer first. May raise UpstreamError.
    """
    branch = environment.branches[index]
    if branch.finish is None:
        return await _make_answer(plan, environment, index, state)
    message = await _branch_message(environment, branch)
    if state.answer is None:
        return message, True
    if branch.ended_by_stop_string and branch.label == state.answer:  # the string may have cut the answer itself
        return message, True
    return message, await _gives_answer(environment, message.content, state.answer)


def _message_as_is(plan: Plan, environment: LiveEnvironment, index: int, state: State) -> tuple[Message, bool]:
    """Return a message without another request to the upstream, and whether the branch agrees with the vote.

    The message is the branch's text, or a statement of the voted answer. Raises DeadlinePassed if there is neither.
    """
    environment.discard_in_flight()
    branch = environment.branches[index]
    if state.answer is None and not branch.ids:  # this is the longest branch, so no branch has a token
        raise deadline_error()
    if state.answer is not None and (branch.finish is None or branch.label != state.answer):
        return _statement(plan, environment, index, state.answer), False
    reasoning, content = plan.prompt.template.split(plan.prompt.tail, branch.text)
    visible = len(branch.ids) * len(content) // max(1, len(branch.text))  # an estimate: counting takes a request
    return Message(content, reasoning, branch.finish or "length", visible, branch.text), True


def _statement(plan: Plan, environment: LiveEnvironment, index: int, answer: int) -> Message:
    """Return a message with the reasoning of branch `index` and a statement of the voted answer by the proxy."""
    template, tail, own = plan.prompt.template, plan.prompt.tail, environment.branches[index].text
    content = template.led(environment.labels.written(answer))
    return Message(content, template.split(tail, own)[0], "stop", 0, own + template.closing(tail, own) + content)


async def _gives_answer(environment: LiveEnvironment, content: str, label: int) -> bool:
    """Return whether a reply gives the answer with this label."""
    answer = await environment.grader.read(content, environment.prompt.kind)
    return await environment.number(answer) == label


async def _make_answer(plan: Plan, environment: LiveEnvironment, index: int, state: State) -> tuple[Message, bool]:
    """Make an unfinished branch close its thought and answer. Return the message and whether it agrees with the vote.

    The branch first answers freely. If it does not give the voted answer, or the deadline has passed, the probe's
    suffix leads it into the answer. If it still disagrees, the message states the voted answer.
    """
    template, answer = plan.prompt.template, state.answer
    own = environment.branches[index].text
    reasoning = template.split(plan.prompt.tail, own)[0]
    closed = own + template.closing(plan.prompt.tail, own)
    if state.stop is not Stop.DEADLINE:
        closing = await environment.suffix(index, lead=False)
        output = await environment.extend(index, closing, plan.final_answer_limits.free, GREEDY)
        content = output.text.strip()
        if answer is None or await _gives_answer(environment, content, answer):
            content = environment.stops.trim(content)
            written = closed + (output.text if content == output.text.strip() else content)
            return Message(content, reasoning, output.finish or "stop", len(output.ids), written), True
    suffix = await environment.suffix(index, lead=True)
    output = await environment.extend(index, suffix, plan.final_answer_limits.led, probe_templates.sampling())
    content, visible = template.led(output.text), len(suffix) + len(output.ids)
    if answer is None or await _gives_answer(environment, content, answer):
        return Message(content, reasoning, "stop", visible, closed + content), True
    return _statement(plan, environment, index, answer), False


async def _branch_message(environment: LiveEnvironment, branch: LiveBranch) -> Message:
    """Return the message of a finished branch, unchanged."""
    template, tail = environment.prompt.template, environment.prompt.tail
    ids, text, finish = branch.ids, branch.text, branch.finish or "stop"
    reasoning, content = template.split(tail, text)
    if reasoning is None or not template.ending:
        return Message(content, reasoning, finish, len(ids), text)
    marker = await environment.engine.tokenise_suffix(environment.prompt.model, template.ending)
    return Message(content, reasoning, finish, len(ids) - _end_of_last(ids, marker), text)


def _end_of_last(ids: list[int], marker: list[int]) -> int:
    """Return the index after the last occurrence of `marker` in `ids`; the length of `ids` if there is none."""
    for start in range(len(ids) - len(marker), -1, -1):
        if ids[start : start + len(marker)] == marker:
            return start + len(marker)
    return len(ids)
