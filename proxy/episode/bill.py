"""Token bill of an episode: its tokens by purpose, and the `usage` object of its reply."""

from __future__ import annotations

from typing import Any

from controllers import State
from proxy.environment.live_environment import LiveEnvironment
from proxy.types import Message, Plan


def token_bill(environment: LiveEnvironment, state: State, winner: int, final_answer: int) -> dict[str, int]:
    """Return the tokens by purpose. They add up to all tokens that the upstream reported.

    `winner` is the branch whose text the client reads. `final_answer` is the number of tokens spent on its final
    answer. Tokens that no fact accounts for count as aborted.
    """
    tokens = state.ledger(winner)
    if environment.branches[winner].finish == "stop":  # the state lacks a round that was cut after this branch ended
        tokens["winner"] = len(environment.branches[winner].ids)
    tokens["probe"] += environment.own_probe_tokens
    tokens["finalise"] = final_answer
    tokens["aborted"] = environment.meter.billed - sum(tokens.values())
    return tokens


def usage(plan: Plan, environment: LiveEnvironment, message: Message) -> dict[str, Any]:
    """Return OpenAI's `usage` over all branches and probes. The prompt counts once, though every call re-sends it."""
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
