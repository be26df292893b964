"""Why an episode stopped: what each round asked for and brought, what was given up, and what voting would have cost.

Only what the controller was shown is told, in numbers. Why it wanted what it asked for nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple, TypedDict

from controllers import Round, State, Stop, Verb
from controllers.builtin import BASELINE
from controllers.voting import tally
from discovery.answers import is_redacted
from discovery.answers.redaction import MARK
from discovery.audit.served_episodes import controller_rounds, replay_states, stop_of
from discovery.store.records import ServedEpisode

CHAINS: Final = (8, 16, 32, 64)
"""Of the self-consistency an episode is held against."""
SHOWN: Final = 6
"""Characters of a veiled answer that are shown."""

LabelName = Callable[[int], str]
"""What a label is called."""


class Ballot(TypedDict):
    """Branches that give one answer."""

    label: int
    answer: str
    count: int


class RoundSummary(TypedDict):
    """One round: what was asked for, by branch, and how things stood after it."""

    number: int  # from 1
    opened: list[int]
    advanced: list[int]  # a branch that was asked twice stands there twice
    asked: list[int]
    pruned: list[int]
    answered: list[str | None]  # the answer that ended it, if this round did
    baseline: bool  # it was the baseline that decided
    finished: int  # branches that have come to their ends
    running: int
    votes: list[Ballot]  # of finished branches, the most first
    leaning: list[Ballot]  # what running branches last said
    tokens: int  # spent so far


class PrunedBranch(TypedDict):
    """A branch that was given up, and how it stood to the others when that was decided."""

    branch: int
    round: int
    tokens: int  # it had generated
    answer: str | None  # its latest
    count: int  # branches that gave that answer, among those that counted
    leader: str | None  # the answer that led
    leader_count: int
    why: str


class ConsistencyEstimate(TypedDict):
    """What self-consistency would have cost, estimated from the lengths of an episode's own branches."""

    chains: int
    estimated_tokens: int
    finished: int  # lengths it rests on
    unfinished: int  # branches of which only a least length is known
    at_least: bool  # the longest was not seen to finish: what lies beyond it is left out


class Explanation(TypedDict):
    """All that is told of an episode."""

    request: str
    client_request_id: str | None  # what its client calls it
    tenant: str  # a hash; empty for a caller without a key
    created: str
    model: str
    controller: str
    digest: str
    beta: float
    stop: str
    why: str  # it stopped
    answer: str | None
    answers: list[str]  # by label
    fallback: str | None  # why the baseline decided in the end, if it did
    decided: int  # rounds before that
    branches: int
    rounds: list[RoundSummary]
    pruned: list[PrunedBranch]
    ledger: Mapping[str, int]  # tokens by what they were spent on
    tokens: int  # all of them
    estimates: list[ConsistencyEstimate] | None  # None if no branch finished


def explain(episode: ServedEpisode) -> Explanation:
    """What happened in an episode and why it stopped, ready for JSON. Raises TraceError."""
    about, own = episode.about, controller_rounds(episode)
    answers = [display_answer(answer) for answer in about.get("answers", ())]
    name = label_names(answers)
    told: list[RoundSummary] = []
    pruned: list[PrunedBranch] = []
    before: Mapping[int, _Standing] = {}
    for state, played in replay_states(episode):
        if played is not None:
            told.append(summarise_round(state, played, name, baseline=state.rounds > own))
            dropped = [one.branch for one in played.actions if one.verb is Verb.PRUNE]
            pruned += [_pruned(state, i, before, name) for i in dropped if state.branches[i].pruned]
        before = _standings(state)
    stop = stop_of(episode)
    if stop is not None:
        state.end(stop)
    answer = None if episode.answer is None else display_answer(episode.answer)
    return Explanation(
        request=episode.request_id,
        client_request_id=about.get("client_request_id"),
        tenant=episode.tenant,
        created=episode.created,
        model=episode.model,
        controller=episode.controller,
        digest=episode.digest,
        beta=episode.beta,
        stop=episode.stop,
        why=_why(episode, stop, state, answer, name),
        answer=answer,
        answers=answers,
        fallback=about.get("fallback"),
        decided=own,
        branches=episode.branches,
        rounds=told,
        pruned=pruned,
        ledger=dict(episode.ledger),
        tokens=sum(episode.ledger.values()),
        estimates=consistency_estimates([(one.tokens, one.finished) for one in state.branches]),
    )


def display_answer(answer: str) -> str:
    """An answer as people are shown it: one that cannot be read by the beginning of its hash."""
    return f"#{answer.removeprefix(MARK)[:SHOWN]}" if is_redacted(answer) else answer


def label_names(answers: Sequence[str]) -> LabelName:
    """What labels are called whose answers are known; others by their numbers."""
    return lambda label: answers[label] if label < len(answers) else f"answer {label}"


def summarise_round(state: State, played: Round, name: LabelName = str, baseline: bool = False) -> RoundSummary:
    """The round that led to `state`."""
    by_verb: dict[Verb, list[Any]] = {verb: [] for verb in Verb}
    width = state.width - sum(action.verb is Verb.BRANCH for action in played.actions)
    for action in played.actions:
        if action.verb is Verb.ANSWER:
            by_verb[Verb.ANSWER].append(None if action.label is None else name(action.label))
            continue
        by_verb[action.verb].append(width if action.verb is Verb.BRANCH else action.branch)
        width += action.verb is Verb.BRANCH
    leaning = tally(state.branches[i].label for i in state.active if state.branches[i].probed)
    return RoundSummary(
        number=state.rounds,
        opened=by_verb[Verb.BRANCH],
        advanced=by_verb[Verb.CONTINUE],
        asked=by_verb[Verb.PROBE],
        pruned=by_verb[Verb.PRUNE],
        answered=by_verb[Verb.ANSWER],
        baseline=baseline,
        finished=len(state.finished),
        running=len(state.active),
        votes=_ballots(state.votes, name),
        leaning=_ballots(leaning, name),
        tokens=state.spent,
    )


def _ballots(votes: Mapping[int, int], name: LabelName) -> list[Ballot]:
    ranked = sorted(votes.items(), key=lambda one: -one[1])
    return [Ballot(label=label, answer=name(label), count=count) for label, count in ranked]


# What was given up


class _Standing(NamedTuple):
    """How a branch stood to the others."""

    asked: bool
    label: int | None  # its latest
    leader: int | None
    votes: Mapping[int, int]  # by which that leads: of finished branches, or else of running ones
    of: str  # which branches those are


def _standings(state: State) -> dict[int, _Standing]:
    """Of every running branch."""
    votes, of = _votes(state)
    leader, branches = state.leader(), state.branches
    return {i: _Standing(branches[i].probed > 0, branches[i].label, leader, votes, of) for i in state.active}


def _votes(state: State) -> tuple[Mapping[int, int], str]:
    """What `State.leader` goes by: the votes of finished branches, or else the latest answers of those not pruned."""
    if state.votes:
        return dict(state.votes), format_branch_count(len(state.finished), "finished")
    kept = [branch for branch in state.branches if not branch.pruned]
    asked = sum(branch.finished or branch.probed > 0 for branch in kept)
    return tally(branch.label for branch in kept), format_branch_count(asked, "asked")


def format_branch_count(count: int, which: str) -> str:
    """So many branches of a kind, in words."""
    return f"{count} {which} branch" + ("" if count == 1 else "es")


def _pruned(state: State, index: int, before: Mapping[int, _Standing], name: LabelName) -> PrunedBranch:
    """Branch `index`, which the round that led to `state` gave up; it was decided on what was known `before`."""
    standing = before.get(index, _Standing(False, None, None, {}, ""))
    label, leader = standing.label, standing.leader
    return PrunedBranch(
        branch=index,
        round=state.rounds,
        tokens=state.branches[index].tokens,
        answer=None if label is None else name(label),
        count=0 if label is None else standing.votes.get(label, 0),
        leader=None if leader is None else name(leader),
        leader_count=0 if leader is None else standing.votes[leader],
        why=_stood(standing, name),
    )


def _stood(standing: _Standing, name: LabelName) -> str:
    """`its latest answer was 9, given by 1 of 5 finished branches; 7 led with 4`."""
    asked, label, leader, votes, of = standing
    led = "nothing led" if leader is None else f"{name(leader)} led with {votes[leader]}"
    if label is None:
        said = "its latest answer could not be read" if asked else "it had not been asked"
        return f"{said}; {led}" + ("" if leader is None else f" of {of}")
    if label == leader:
        return f"its latest answer was {name(label)}, which led with {votes[label]} of {of}"
    return f"its latest answer was {name(label)}, given by {votes.get(label, 0)} of {of}; {led}"


# Why it stopped


def _why(episode: ServedEpisode, stop: Stop | None, state: State, answer: str | None, name: LabelName) -> str:
    """One sentence."""
    about, own = episode.about, controller_rounds(episode)
    fallback, limits = about.get("fallback"), about.get("limits") or {}
    margin = _margin(state, name)
    best = "no answer had been given" if answer is None else f"the best answer so far was {answer}{margin}"
    if stop is Stop.ANSWERED:
        who = "The controller" if fallback is None else "The baseline"
        words = f"{who} ended it without an answer{margin}" if answer is None else f"{who} answered {answer}{margin}"
    elif (refused := about.get("refused")) is not None:
        words = f"{_REFUSED.get(refused, f'A round was refused ({refused})')}; {best}"
    elif stop is Stop.MAX_TOKENS:
        cap, spent = limits.get("max_tokens"), about.get("spent", state.spent)
        under = "" if cap is None else f" of {cap:,} tokens, {spent:,} of which were spent"
        words = f"Nothing that was asked for fitted under the cap{under}; {best}"
    elif stop is Stop.NOT_VOTABLE:
        words = "The first branch to finish gave no answer that could be voted on"
    else:
        words = _OUTSIDE.get(episode.stop, f"It ended ({episode.stop})") + ("" if stop is None else f"; {best}")
    if fallback is not None:
        words += f"; the baseline, {BASELINE}, had decided from round {own} on ({fallback})"
    return words + "."


_REFUSED: Final[Mapping[str, str]] = {
    "cut_short": "The request's max_tokens cut the first branches before they answered, so no more were opened",
    "all_cut": "The request's max_tokens cut every branch before it answered",
    "sent_too_much": "It had sent as much to the upstream as AUTOTTS_MAX_SENT_BYTES allows",
}
_OUTSIDE: Final[Mapping[str, str]] = {
    Stop.DEADLINE: "Time was up",
    Stop.UPSTREAM_ERROR: "The upstream failed",
    Stop.CONTROLLER_ERROR: "The controller failed, and nothing could take over",
    "disconnected": "The client left",
    "draining": "The proxy was about to end",
    "failed": "The proxy failed",
}


def _margin(state: State, name: LabelName) -> str:
    """` (5 of 7 finished branches; next 9 with 2)`; nothing where nothing is known of the vote."""
    votes, of = _votes(state)
    if not state.width:
        return ""
    if state.answer is None:
        return f" ({of} gave none)" if not votes else ""
    others = [one for one in _ballots(votes, name) if one["label"] != state.answer]
    behind = f"next {others[0]['answer']} with {others[0]['count']}" if others else "no other was given"
    return f" ({votes.get(state.answer, 0)} of {of}; {behind})"


# What self-consistency would have cost


def consistency_estimates(lengths: Sequence[tuple[int, bool]]) -> list[ConsistencyEstimate] | None:
    """For `CHAINS`, and as many as there are `lengths`: tokens of each branch, and whether it finished.

    Branches that did not finish count as at least as long as they were, as if giving up were no sign of length. None if
    no branch finished.
    """
    finished = sum(ended for _, ended in lengths)
    if not finished:
        return None
    mean, beyond = restricted_mean(lengths)
    return [
        ConsistencyEstimate(
            chains=chains,
            estimated_tokens=round(chains * mean),
            finished=finished,
            unfinished=len(lengths) - finished,
            at_least=beyond > 0,
        )
        for chains in sorted({*CHAINS, len(lengths)})
    ]


def restricted_mean(lengths: Sequence[tuple[int, bool]]) -> tuple[float, float]:
    """The Kaplan-Meier mean of lengths, some of which are censored (False), up to the longest; and the part beyond."""
    alive, mean, at, left = 1.0, 0.0, 0, len(lengths)
    for length, group in groupby(sorted(lengths), key=lambda one: one[0]):
        ends = [ended for _, ended in group]
        mean += alive * (length - at)
        alive *= 1 - sum(ends) / left
        at, left = length, left - len(ends)
    return mean, alive
