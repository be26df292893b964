"""Token bill of an episode: its tokens by purpose, and the `usage` object of its reply."""

from __future__ import annotations

from typing import Any

from controllers import State
from proxy.environment.episode_environment import EpisodeEnvironment
from proxy.environment.token_meter import TokenMeter


def token_bill(environment: EpisodeEnvironment, state: State, winner: int | None, final_answer: int) -> dict[str, int]:
    """Return the tokens by purpose. They add up to all tokens that the upstream reported.

    `winner` is the branch whose text the client reads; None if no branch wrote it. `final_answer` is the number of
    tokens spent on its final answer. Tokens that no fact accounts for count as aborted.
    """
    tokens = state.ledger(winner)
    if winner is not None and environment.branches[winner].finish == "stop":
        tokens["winner"] = len(environment.branches[winner].ids)  # the state may lack the round in which it ended
    tokens["probe"] += environment.own_probe_tokens
    tokens["finalise"] = final_answer
    tokens["judge"] = environment.meter.judge_tokens
    tokens["aborted"] = environment.meter.billed - sum(tokens.values())
    return tokens


def usage(meter: TokenMeter, prompt_tokens: int, visible_tokens: int) -> dict[str, Any]:
    """Return OpenAI's `usage` over all calls: branches, probes and the judge.

    The `prompt_tokens` of the request count once, though every call re-sends them, and so does what the proxy added.
    `visible_tokens` are those of the content that the client reads.
    """
    prompt = prompt_tokens + meter.suffix_tokens
    completion = meter.generated_tokens + meter.aborted_tokens
    cached = None if meter.first_cached is None else min(meter.first_cached, prompt)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": max(0, completion - visible_tokens)},
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
    }
