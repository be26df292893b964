"""Build the `tts` object and the `x-tts-*` headers of a reply: how the answer was found and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from controllers import State
from discovery.answers import Answer
from discovery.data.recordings import RecordedBranch
from proxy.environment.episode_environment import EpisodeEnvironment
from proxy.episode.agreement import agreement_fields, agreement_headers
from proxy.recording.recorded_branches import as_json
from proxy.types import Plan


def early_headers(plan: Plan) -> dict[str, str]:
    """Return the headers that are known before the first branch."""
    return {
        "x-request-id": plan.request_id,
        "x-tts-applied": "true",
        "x-tts-beta": f"{plan.beta.value:g}",
        "x-tts-beta-source": plan.beta.source_text,
        "x-tts-controller": plan.controller,
    }


def reply_headers(plan: Plan, tts: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers of a reply with this `tts` object."""
    return {
        **early_headers(plan),
        "x-tts-branches": str(tts["branches"]),
        "x-tts-rounds": str(tts["rounds"]),
        "x-tts-tokens": str(tts["tokens"]["total"]),
        "x-tts-stop": tts["stop"],
        **agreement_headers(tts),
        **({} if (reason := tts["fallback"]) is None else {"x-tts-fallback": reason}),
    }


def tts_object(
    plan: Plan,
    environment: EpisodeEnvironment,
    state: State,
    answer: Answer | None,
    *,
    label: int | None,
    agreed: bool,
    tokens: Mapping[str, int],
    fallback: str | None,
    escalated_beta: float | None,
    recorded: Sequence[RecordedBranch],
) -> dict[str, Any]:
    """Return the `tts` object.

    `answer` is read from the reply's message, and `label` is that of the reply. `agreed` says whether the message gives
    the voted answer. `tokens` is the bill. `fallback` is the reason why the baseline decided, or None. `escalated_beta`
    is the β at which the episode continued, or None. `recorded` are all branches, if the plan records them.
    """
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
        "stage_model": plan.choice.stage_model,
        "branches": len(environment.branches),
        "rounds": state.rounds,
        "stop": str(state.stop),
        "answer": written[state.answer] if state.answer is not None else answer and answer.written,
        "answer_kind": str(plan.prompt.kind),
        "probe_template": plan.probe_template or None,
        "agreed": None if state.answer is None else agreed,
        **agreement_fields(state, label, plan.agreement_rule, escalated_beta),
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
        "fallback": fallback,
        **({"recording": _recording(plan, recorded)} if plan.records_all else {}),
    }


def _recording(plan: Plan, recorded: Sequence[RecordedBranch]) -> dict[str, Any]:
    """Return the recorded branches and how they were generated, in the generic recording format."""
    return {
        "interval": plan.environment_limits.interval,
        "sampling": plan.provenance.sampling,
        "probe_template": plan.probe_template,
        "chat_template": plan.provenance.chat_template,
        "branches": [as_json(branch) for branch in recorded],
    }
