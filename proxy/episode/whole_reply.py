"""Compose the reply of an episode whose branches are whole replies of the upstream: one of them, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from controllers import State, Stop
from discovery.answers.code import CodeTask, finalists
from discovery.data.recordings import RecordedBranch
from proxy.environment.reply_environment import ReplyBranch, ReplyEnvironment
from proxy.environment.reply_votes import SelectedBy, SelectedReply, select_by_overlap
from proxy.environment.selection.reply_judge import JudgeOutcome, ReplyJudgement, judge_replies
from proxy.episode.bill import token_bill, usage
from proxy.episode.deadline_vote import branches_with_leading_label, is_without_vote
from proxy.episode.reply import deadline_error
from proxy.episode.tts_object import tts_object
from proxy.reply_request import JudgeLimits, ReplyRequest
from proxy.types import Message, Plan, Reply
from proxy.upstream.chat_stream import ChatOutput


async def compose_whole_reply(
    plan: Plan,
    environment: ReplyEnvironment,
    state: State,
    recorded: Sequence[RecordedBranch] = (),
    fallback: str | None = None,
    escalated_beta: float | None = None,
    timeout_s: float | None = None,
) -> Reply:
    """Return the reply to an ended episode whose streams are closed. Raises UpstreamTimeout if nothing has arrived.

    `recorded` are all branches, if the plan records them. Answers that no fact has revealed are read for up to
    `timeout_s`.
    """
    request = environment.request
    environment.salvage()
    if state.stop is Stop.DEADLINE:
        environment.run_no_more()
    selected = await _select(plan, environment, state, timeout_s)
    branch = environment.branches[selected.branch]
    if not branch.ids:
        raise deadline_error()
    judgement = selected.judgement
    written = None if judgement is None else judgement.written
    message = _message(request, written or branch.output)
    label = None if written else branch.label
    if not request.has_votes:  # labels only tell replies apart, so that the controller's answer says nothing
        state.answer = label
    tokens = token_bill(environment, state, None if written else selected.branch, 0)
    tts = tts_object(
        plan,
        environment,
        state,
        None,
        label=label,
        agreed=label == state.answer,
        tokens=tokens,
        fallback=fallback,
        escalated_beta=escalated_beta,
        recorded=recorded,
    )
    more: dict[str, Any] = {
        "answer": None if label is None else environment.labels.written(label),
        "unreadable": environment.unreadable,
        "selected_by": selected.by,
    }
    if not request.has_votes:
        more |= {"answer": None, "agreed": None}
    if request.code is not None:
        more["code"] = _code_fields(environment, request.code, selected.branch)
    if judgement is not None:
        more |= {"judge": judgement.outcome, "compared": judgement.compared}
    if selected.fields is not None:
        more["fields"] = {field: round(share, 4) for field, share in selected.fields.items()}
    prompt_tokens = max(each.call.prompt_tokens for each in environment.branches)
    spent = usage(environment.meter, prompt_tokens, message.visible_tokens)
    return Reply(plan, message, tokens, spent, {**tts, **more}, label)


async def _select(plan: Plan, environment: ReplyEnvironment, state: State, timeout_s: float | None) -> SelectedReply:
    """Return the branch that the client reads.

    It is the one nearest to the vote of the finished branches on tool calls or JSON. In a vote on texts it is the
    shortest finished branch with the controller's answer, or with the plurality of the replies that had ended if the
    deadline cut the round before the controller had one. If the request asks for it, the model compares the replies.
    Without a vote it is the longest complete reply, or else the longest reply.
    """
    branches = environment.branches
    voted = sorted(index for index in state.finished if state.branches[index].label is not None)
    if not voted:  # the episode may have ended before facts revealed complete replies
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for index in range(len(branches)):
                    if await environment.read_finished(index) is not None:
                        voted.append(index)
    selected = await environment.select(voted)
    if selected is not None:
        return selected
    judge = environment.request.judge
    if judge is not None and environment.candidates:
        return await _select_by_text(plan, environment, state, judge)
    agreeing: Collection[int] = [index for index in voted if branches[index].label == state.answer]
    if is_without_vote(state):
        agreeing = branches_with_leading_label(state, {index: branches[index].label for index in voted})
    if agreeing:
        return SelectedReply(min(agreeing, key=lambda index: len(branches[index].ids)), by=SelectedBy.VOTE)
    if not branches:
        raise deadline_error()
    longest = max(range(len(branches)), key=lambda index: _rank(branches, index))
    return SelectedReply(longest)


async def _select_by_text(
    plan: Plan, environment: ReplyEnvironment, state: State, limits: JudgeLimits
) -> SelectedReply:
    """Return the reply whose function wins the vote on behaviour, if several could be run.

    In a tie, or without such a vote, it is the one that the model chooses or writes. If it does not, the reply that
    shares most words with others.
    """
    candidates = environment.candidates
    if len(environment.behaviours) > 1:
        leading = finalists(environment.behaviours)
        if len(leading) == 1:
            return SelectedReply(leading[0], by=SelectedBy.VOTE)
        candidates = [candidate for candidate in candidates if candidate.branch in leading]
    texts = {candidate.branch: candidate.text for candidate in candidates}
    first = candidates[0].branch
    if len({text.strip() for text in texts.values()}) == 1:
        return SelectedReply(first, by=None if len(texts) == 1 else SelectedBy.OVERLAP)
    if state.stop in (Stop.DEADLINE, Stop.UPSTREAM_ERROR):
        judgement = ReplyJudgement(JudgeOutcome.SKIPPED)
    else:
        judgement = await judge_replies(environment, environment.request.body, limits, candidates, plan.remaining_s)
    if judgement.outcome is JudgeOutcome.CHOSEN:
        branch = first if judgement.branch is None else judgement.branch
        return SelectedReply(branch, by=SelectedBy.JUDGE, judgement=judgement)
    return SelectedReply(await select_by_overlap(texts), by=SelectedBy.OVERLAP, judgement=judgement)


def _code_fields(environment: ReplyEnvironment, task: CodeTask, branch: int) -> dict[str, Any]:
    """Return `tts.code`: how many replies could be run, and how many of the stated outputs the selected one returns."""
    behaviour = environment.behaviours.get(branch)
    return {
        "inputs": len(task.examples),
        "expected": sum(example.expected is not None for example in task.examples),
        "ran": len(environment.behaviours),
        "satisfied": None if behaviour is None else behaviour.satisfied,
    }


def _rank(branches: Sequence[ReplyBranch], index: int) -> tuple[bool, int]:
    return branches[index].finish == "stop", len(branches[index].ids)


def _message(request: ReplyRequest, output: ChatOutput) -> Message:
    """Return the message of a reply, exactly as the upstream sent it. A reply that was cut ends for its length."""
    content, thought, calls = output.content, "".join(output.thoughts), output.tool_call_objects
    written = len(content) + sum(len(arguments) for _, arguments in output.calls)
    visible = len(output.ids) * written // max(1, written + len(thought))  # the server does not count them
    return Message(
        content=content,
        reasoning=thought or None,
        finish_reason=output.finish_reason or "length",
        visible_tokens=visible if thought else len(output.ids),
        written=content,
        tool_calls=calls,
        logprobs={"content": output.logprobs} if request.body.get("logprobs") else None,
    )
