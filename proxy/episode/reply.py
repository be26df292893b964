"""From a finished episode to the one message its client reads, and the bill."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from controllers import Round, State, Stop
from discovery.answers import Answer
from proxy import probe_templates
from proxy.environment.live_environment import LiveEnvironment
from proxy.errors import UpstreamError, UpstreamTimeout
from proxy.recording import recorded_branches
from proxy.types import LiveBranch, Message, Plan, Reply

logger = logging.getLogger(__name__)

CUT: Final = (Stop.DEADLINE, Stop.MAX_TOKENS, Stop.UPSTREAM_ERROR, Stop.CONTROLLER_ERROR)
"""Reasons for which an episode ends before its vote. Its message may have an answer that nobody voted for."""
GREEDY: Final = {"temperature": 0.0}


def reply_headers(plan: Plan, tts: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers of a reply with the `tts` object."""
    return {
        **early_headers(plan),
        "x-tts-branches": str(tts["branches"]),
        "x-tts-rounds": str(tts["rounds"]),
        "x-tts-tokens": str(tts["tokens"]["total"]),
        "x-tts-stop": tts["stop"],
        **({} if (reason := tts["fallback"]) is None else {"x-tts-fallback": reason}),
    }


def early_headers(plan: Plan) -> dict[str, str]:
    """The headers that are known before the first branch."""
    return {
        "x-request-id": plan.request_id,
        "x-tts-applied": "true",
        "x-tts-beta": f"{plan.beta.value:g}",
        "x-tts-beta-source": plan.beta.source_text,
        "x-tts-controller": plan.controller,
    }


async def compose_reply(
    plan: Plan,
    environment: LiveEnvironment,
    state: State,
    rounds: Sequence[Round],
    fallback: str | None = None,
    seconds: float | None = None,
) -> Reply:
    """The reply to a stopped episode that opened at least one branch. May raise UpstreamError.

    `fallback` is why the baseline decided in it, if it did. What the upstream has not helped to say in so many
    `seconds` goes out as it is; so it does if it fails once the deadline has passed.
    """
    completed = environment.meter.completed
    index = _spokesman(environment, state, state.answer)
    try:
        async with asyncio.timeout(seconds):
            message, agreed = await _finish(plan, environment, index, state)
    except TimeoutError:
        message, agreed = _as_it_is(plan, environment, index, state)
    except UpstreamError as error:
        if state.stop is not Stop.DEADLINE:
            raise
        logger.warning("%s: %s", plan.request_id, error.logged)
        message, agreed = _as_it_is(plan, environment, index, state)
    is_read = state.answer is not None or state.stop in CUT
    answer = await environment.grader.read(message.content, plan.prompt.kind) if is_read else None
    tokens = _ledger(environment, state, index, environment.meter.completed - completed)
    return Reply(
        plan=plan,
        message=message,
        tokens=tokens,
        usage=_usage(plan, environment, message),
        tts={
            **_report(plan, environment, state, answer, agreed, tokens),
            "fallback": fallback,
            **({"recording": _recording(plan, environment, rounds)} if plan.records_all else {}),
        },
    )


async def _finish(plan: Plan, environment: LiveEnvironment, index: int, state: State) -> tuple[Message, bool]:
    """What branch `index` says, and whether that is what was voted for."""
    branch = environment.branches[index]
    if branch.finish is None:
        return await _close(plan, environment, index, state)
    message = await _message(environment, branch)
    if state.answer is None or (branch.is_cut and branch.label == state.answer):  # cut, perhaps within its answer
        return message, True
    return message, await _says(environment, message.content, state.answer)


def _as_it_is(plan: Plan, environment: LiveEnvironment, index: int, state: State) -> tuple[Message, bool]:
    """The same without asking anybody: the branch's own text, or the vote's answer stated. Raises UpstreamTimeout if
    there is neither."""
    environment.write_off()
    branch = environment.branches[index]
    if state.answer is None and not branch.ids:  # nor has any other one said anything
        raise deadline_error()
    if state.answer is not None and (branch.finish is None or branch.label != state.answer):
        return _stated(plan, environment, index, state.answer), False
    reasoning, content = plan.prompt.template.split(plan.prompt.tail, branch.text)
    visible = len(branch.ids) * len(content) // max(1, len(branch.text))  # counting them would be a request
    return Message(content, reasoning, branch.finish or "length", visible, branch.text), True


def deadline_error() -> UpstreamTimeout:
    """There is nothing to answer with."""
    return UpstreamTimeout("the deadline passed before the first token", param="tts.deadline_s")


def _stated(plan: Plan, environment: LiveEnvironment, index: int, answer: int) -> Message:
    """The thought of branch `index`, and the vote's answer in our own words."""
    template, tail, own = plan.prompt.template, plan.prompt.tail, environment.branches[index].text
    content = template.led(environment.labels.written(answer))
    return Message(content, template.split(tail, own)[0], "stop", 0, own + template.closing(tail, own) + content)


async def _says(environment: LiveEnvironment, content: str, label: int) -> bool:
    """Whether a reply gives the answer of `label`."""
    answer = await environment.grader.read(content, environment.prompt.kind)
    return await environment.number(answer) == label


def _spokesman(environment: LiveEnvironment, state: State, answer: int | None) -> int:
    """The branch whose text the client reads: one that finished with the answer, the shortest; else one that leans to
    it, the longest, pruned ones last; without an answer one that came to an end, else the longest."""
    branches = environment.branches
    if answer is None:
        return max(range(len(branches)), key=lambda i: (branches[i].finish == "stop", len(branches[i].ids)))
    finished = [i for i, branch in enumerate(branches) if branch.finish is not None and branch.label == answer]
    if finished:
        return min(finished, key=lambda i: len(branches[i].ids))
    leaning = [i for i, known in enumerate(state.branches) if known.label == state.answer]
    return max(
        leaning or range(len(branches)),
        key=lambda i: (
            branches[i].finish is None,
            not (i < state.width and state.branches[i].pruned),
            len(branches[i].ids),
        ),
    )


async def _close(plan: Plan, environment: LiveEnvironment, index: int, state: State) -> tuple[Message, bool]:
    """Make an unfinished branch close its thought and answer; led into the answer if its own words would not give it,
    or if there is no time for them. If it will not say what was voted for, the message states that and no more.

    Also returns whether the branch agreed."""
    template, answer = plan.prompt.template, state.answer
    own = environment.branches[index].text
    reasoning = template.split(plan.prompt.tail, own)[0]
    closed = own + template.closing(plan.prompt.tail, own)
    if state.stop is not Stop.DEADLINE:
        closing = await environment.suffix(index, lead=False)
        output = await environment.extend(index, closing, plan.final_answer_limits.free, GREEDY)
        content = output.text.strip()
        if answer is None or await _says(environment, content, answer):
            content = environment.stops.trim(content)
            written = closed + (output.text if content == output.text.strip() else content)
            return Message(content, reasoning, output.finish or "stop", len(output.ids), written), True
    suffix = await environment.suffix(index, lead=True)
    output = await environment.extend(index, suffix, plan.final_answer_limits.led, probe_templates.sampling())
    content, visible = template.led(output.text), len(suffix) + len(output.ids)
    if answer is None or await _says(environment, content, answer):
        return Message(content, reasoning, "stop", visible, closed + content), True
    return _stated(plan, environment, index, answer), False


async def _message(environment: LiveEnvironment, branch: LiveBranch) -> Message:
    """A finished branch as it is."""
    template, tail = environment.prompt.template, environment.prompt.tail
    ids, text, finish = branch.ids, branch.text, branch.finish or "stop"
    reasoning, content = template.split(tail, text)
    if reasoning is None or not template.ending:
        return Message(content, reasoning, finish, len(ids), text)
    marker = await environment.engine.tokenise_suffix(environment.prompt.model, template.ending)
    return Message(content, reasoning, finish, len(ids) - _find_last(ids, marker), text)


def _find_last(ids: list[int], marker: list[int]) -> int:
    """Where what follows the last `marker` begins in `ids`; their end if there is none."""
    for at in range(len(ids) - len(marker), -1, -1):
        if ids[at : at + len(marker)] == marker:
            return at + len(marker)
    return len(ids)


def _ledger(environment: LiveEnvironment, state: State, winner: int, finalise: int) -> dict[str, int]:
    """Tokens by what they were spent on. What no fact accounts for was aborted."""
    tokens = state.ledger(winner)
    if environment.branches[winner].finish == "stop":  # a round that was cut when it ended has told the state nothing
        tokens["winner"] = len(environment.branches[winner].ids)
    tokens["probe"] += environment.scouted
    tokens["finalise"] = finalise
    tokens["aborted"] = environment.meter.billed - sum(tokens.values())
    return tokens


def _usage(plan: Plan, environment: LiveEnvironment, message: Message) -> dict[str, Any]:
    """OpenAI's usage, over all branches and probes. The prompt counts once, though every request re-sends it."""
    meter = environment.meter
    prompt = len(plan.prompt.ids) + meter.suffix_tokens
    completion = meter.generated_tokens + meter.aborted_tokens
    cached = None if meter.first_cached is None else min(meter.first_cached, prompt)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": max(0, completion - message.visible_tokens)},
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
    }


def _recording(plan: Plan, environment: LiveEnvironment, rounds: Sequence[Round]) -> dict[str, Any]:
    """The branches of the episode and how they were made, as the generic format has them."""
    return {
        "interval": plan.environment_limits.interval,
        "sampling": plan.provenance.sampling,
        "probe_template": plan.prompt.template.name,
        "chat_template": plan.provenance.chat_template,
        "branches": [branch._asdict() for branch in recorded_branches.branches(environment, rounds)],
    }


def _report(
    plan: Plan,
    environment: LiveEnvironment,
    state: State,
    answer: Answer | None,  # of the message
    agreed: bool,
    tokens: Mapping[str, int],
) -> dict[str, Any]:
    """The `tts` object."""
    meter = environment.meter
    written = {label: environment.labels.written(label) for label in state.votes}
    if state.answer is not None:
        written[state.answer] = environment.labels.written(state.answer) if answer is None else answer.written
    return {
        "applied": True,
        "beta": plan.beta.value,
        "beta_source": plan.beta.source_text,
        **({} if plan.beta.requested is None else {"beta_asked": plan.beta.requested}),
        "controller": plan.controller,
        "controller_digest": plan.spec.digest[:12],
        "stage": plan.stage,
        "branches": len(environment.branches),
        "rounds": state.rounds,
        "stop": str(state.stop),
        "answer": written[state.answer] if state.answer is not None else answer and answer.written,
        "answer_kind": str(plan.prompt.kind),
        "probe_template": plan.prompt.template.name,
        "agreed": None if state.answer is None else agreed,
        "votes": {written[label]: count for label, count in state.votes.items()},
        "temperature": plan.temperature,
        "greedy_first": plan.prompt.greedy_first,
        "interval": plan.environment_limits.interval,
        "tokens": {"total": sum(tokens.values()), **tokens},
        "upstream": {
            "requests": meter.requests,
            "prompt_tokens": meter.prompt_tokens,
            "cached_tokens": meter.cached_tokens,
        },
    }
