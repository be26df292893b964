"""Sentences and names that pages share: why an episode stopped, and what tokens were spent on."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Final

from pydantic import BaseModel, Field

from discovery.audit.vote_margin import (
    describe_agreement,
    describe_decision,
    describe_margin,
    describe_width,
    format_branch_count,
)

STOPS: Final = MappingProxyType(
    {
        "answered": "the controller answered",
        "max_tokens": "max_total_tokens or another cap was reached, or max_tokens cut the branches",
        "deadline": "the deadline passed",
        "not_votable": "the first branches gave nothing that could be voted on",
        "controller_error": "the controller failed",
        "upstream_error": "the upstream failed",
        "disconnected": "the client disconnected",
        "draining": "the proxy was shutting down",
        "failed": "the proxy could not produce a reply",
    }
)
"""Why an episode stopped, after `because`."""
SELECTORS: Final = MappingProxyType(
    {
        "vote": "The votes decided which reply was sent",
        "judge": "The model compared the replies and decided which was sent",
        "overlap": "The reply that shares most words with the others was sent",
    }
)
"""Ways to decide among whole replies, as sentences without their full stop."""
TOKEN_KINDS: Final = MappingProxyType(
    {
        "winner": "the branch that became the reply",
        "agreeing": "other branches with the same answer",
        "losing": "branches with another answer or none",
        "pruned": "branches that were pruned",
        "probe": "probes",
        "finalise": "closing an unfinished branch",
        "judge": "the model comparing replies",
        "aborted": "requests that were aborted",
        "passed_through": "requests without a controller",
        "recording": "completing branches for recordings",
    }
)
"""Meaning of each kind of tokens."""

_Count = Annotated[int, Field(ge=0)]


class EndedEpisode(BaseModel):
    """An episode that ended, as the playground knows it: fields of its `tts` object, and its finished branches."""

    controller: str
    beta: float
    rounds: _Count
    branches: _Count
    finished: _Count  # branches, with an answer or without
    stop: str
    answer: str | None = None
    votes: dict[str, _Count] = {}  # of finished branches
    agreement: float | None = None
    confidence: float | None = None
    selected_by: str | None = None
    fallback: str | None = None
    escalated_beta: float | None = None  # β at which the baseline continued, because too few agreed


def describe_end(episode: EndedEpisode, most_branches: int) -> str:
    """Return why an episode ended and what its answer was based on. It could open `most_branches` branches."""
    answer, counted = episode.answer, format_branch_count(episode.finished, "finished")
    has_vote = answer is not None and answer in episode.votes
    margin = describe_margin(answer, episode.votes.items(), counted) if answer is not None and has_vote else ""
    rounds = f"{episode.rounds} round" + ("" if episode.rounds == 1 else "s")
    served_by = f"{episode.controller} at β {episode.beta:g} stopped after {rounds}"
    if episode.stop == "answered":
        decider = "The controller" if episode.fallback is None and episode.escalated_beta is None else "The baseline"
        decision = describe_decision(decider, answer, margin) + describe_width(episode.branches, most_branches)
        sentences = [f"{served_by}.", f"{decision}."]
    else:
        best = "no answer had been given" if answer is None else f"the best answer so far was {answer}{margin}"
        sentences = [f"{served_by} because {STOPS.get(episode.stop, episode.stop)}; {best}."]
    sentences.append(describe_agreement(episode.agreement, episode.confidence))
    if episode.selected_by is not None:
        sentences.append(f"{SELECTORS.get(episode.selected_by, episode.selected_by)}.")
    if episode.fallback is not None:
        sentences.append(f"The baseline took over ({episode.fallback}).")
    return " ".join(filter(None, sentences))
