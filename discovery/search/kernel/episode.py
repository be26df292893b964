"""Episodes of a policy over a cell, played as the runner plays the policy's controller file.

The file of the policy is written by `discovery.search.explorers.controller_writer`, the facts of a round come from
`discovery.evaluation.replay`, and `controllers.state` says what they change.
"""

from __future__ import annotations

from math import inf, nan

import numpy as np
from numpy.typing import NDArray

from discovery.search.kernel.choices import chains_to_open, choose_running, mark_lost, prune_lost
from discovery.search.kernel.jit import compiled
from discovery.search.kernel.records import (
    IS_FINISHED,
    IS_PRUNED,
    NO_PRUNING,
    NOBODY,
    RUNS,
    UNSEEN_WINDOW,
    Record,
    Records,
)
from discovery.search.kernel.stop_rules import is_settled
from discovery.search.kernel.votes import (
    begin_votes,
    count_votes,
    first_most,
    place_of,
    poll,
    set_limits,
)


@compiled
def play(
    policies: Records,
    questions: Records,
    branches: Records,
    probes: Records,
    intervals: Records,
    tables: NDArray[np.float64],
    every: int,
    orders: NDArray[np.int64],
    episodes: Records,
    chains: Records,
    places: Records,
    outcomes: NDArray[np.int64],
    answers: NDArray[np.int64],
) -> None:
    """Play every n-th question of a cell under every policy and order; `orders` is (kinds, shuffles, branches).

    Fills `outcomes`, (policies, columns, shuffles, questions) with the columns `OUTCOME_COLUMNS`, and `answers`,
    (policies, shuffles, questions) with the number of the answer in its recording. `episodes` has one record.
    """
    episode = episodes[0]
    for number in range(len(policies)):
        policy = policies[number]
        for shuffle in range(orders.shape[1]):
            for at in range(answers.shape[2]):
                question = questions[at * every]
                order = orders[question.order, shuffle]
                begin_episode(episode)
                _open_first(policy, branches, intervals, episode, chains, question, order)
                answer = _play_on(policy, branches, probes, intervals, tables, episode, chains, places, question, order)
                answers[number, shuffle, at] = answer
                right = answer != NOBODY and answer == question.reference
                write_outcome(episode, chains, places, answer, right, outcomes[number, :, shuffle, at])


@compiled
def begin_episode(episode: Record) -> None:
    """Begin an episode. Places keep the stamps of earlier ones, which never occur again."""
    episode.opened, episode.ended, episode.rounds = 0, 0, 0
    episode.spent, episode.critical_path = 0, 0
    episode.actives, episode.finishes, episode.counted = 0, 0, 0
    episode.known, episode.leader = 0, NOBODY
    episode.total, episode.squares, episode.voters, episode.anchor = 0.0, 0.0, 0.0, nan
    episode.longest, episode.level, episode.limit = inf, -inf, -1.0


@compiled
def _open_first(
    policy: Record,
    branches: Records,
    intervals: Records,
    episode: Record,
    chains: Records,
    question: Record,
    order: NDArray[np.int64],
) -> None:
    """Play the first round."""
    wanted = max(1, min(min(policy.first, policy.most), question.width))
    episode.critical_path += open_chains(policy, branches, intervals, episode, chains, question, order, wanted)
    close_round(episode, chains, 0, 0)


@compiled
def _play_on(
    policy: Record,
    branches: Records,
    probes: Records,
    intervals: Records,
    tables: NDArray[np.float64],
    episode: Record,
    chains: Records,
    places: Records,
    question: Record,
    order: NDArray[np.int64],
) -> int:
    """Play an episode from the second round on; return the answer's number, or NOBODY."""
    delta, is_steady = question.interval, False
    while True:
        opened, ended = episode.opened, episode.ended
        if is_steady and episode.counted == episode.finishes:
            for at in range(episode.actives):
                episode.running[at] = episode.active[at]
            repeat_rounds(episode, chains, episode.actives, delta)
            longest = advance(policy, probes, intervals, episode, chains, NOBODY, episode.actives, delta)
            episode.critical_path += longest
            close_round(episode, chains, opened, ended)
            continue
        if episode.counted < episode.finishes:
            count_votes(policy, intervals, episode, chains, places)
            set_limits(policy, intervals, episode, chains)
        votes, known, leader = episode.votes, episode.known, episode.leader
        if policy.pool:
            known = poll(policy, episode, chains, places)
            votes = episode.polled
            leader = first_most(votes, known)
        label = episode.labels[leader] if leader != NOBODY else NOBODY
        if policy.prune != NO_PRUNING:
            mark_lost(policy, intervals, episode, chains, label)
        running = choose_running(policy, episode, chains)
        room = question.width - opened
        more = chains_to_open(policy, opened, running, room)
        settled = is_settled(policy, tables, episode, votes, known, leader, running, room)
        if settled or running + more == 0:
            if policy.depth and leader == NOBODY and _probe_unasked(probes, episode, chains):
                continue
            episode.rounds += 1
            return int(label) if leader != NOBODY else state_leader(episode, chains, places)
        if policy.prune != NO_PRUNING:
            prune_lost(episode, chains)
        longest = advance(policy, probes, intervals, episode, chains, label, running, delta)
        started = open_chains(policy, branches, intervals, episode, chains, question, order, more)
        episode.critical_path += max(longest, started)
        close_round(episode, chains, opened, ended)
        is_steady = policy.repeats_rounds == 1 and more == 0


@compiled
def repeat_rounds(episode: Record, chains: Records, running: int, delta: int) -> None:
    """Play at once the rounds in which the running chains advance and none ends."""
    rounds = chains[episode.running[0]].left
    for at in range(1, running):
        rounds = min(rounds, chains[episode.running[at]].left)
    for at in range(running):
        chain = chains[episode.running[at]]
        chain.left -= rounds
        chain.tokens += rounds * delta
    episode.rounds += rounds
    episode.spent += rounds * delta * running
    episode.critical_path += rounds * delta


@compiled
def open_chains(
    policy: Record,
    branches: Records,
    intervals: Records,
    episode: Record,
    chains: Records,
    question: Record,
    order: NDArray[np.int64],
    more: int,
) -> int:
    """Open `more` chains, each with its first interval; return the most tokens of one."""
    longest = 0
    for _ in range(more):
        branch = branches[question.branch + order[episode.opened]]
        chain = chains[episode.opened]
        chain.probe, chain.start, chain.probes = branch.probe, branch.start, branch.probes
        chain.length, chain.final, chain.left = branch.tokens, branch.final, branch.probes
        chain.tokens, chain.probe_tokens, chain.probed = 0, 0, 0
        chain.label, chain.lowest, chain.said = NOBODY, UNSEEN_WINDOW, NOBODY
        chain.log_probability, chain.probe_confidence = nan, nan
        chain.fate, chain.is_lost, chain.strayed, chain.changes = RUNS, 0, 0, 0
        episode.opened += 1
        longest = max(longest, _run(policy, intervals, episode, chains, episode.opened - 1, 1, question.interval))
    return longest


@compiled
def advance(
    policy: Record,
    probes: Records,
    intervals: Records,
    episode: Record,
    chains: Records,
    leader: int,
    running: int,
    delta: int,
) -> int:
    """Advance the running chains and probe them if the policy does; return the most tokens of one."""
    longest = 0
    for at in range(running):
        number = episode.running[at]
        is_fast = policy.pace and leader != NOBODY and chains[number].label == leader
        tokens = _run(policy, intervals, episode, chains, number, 2 if is_fast else 1, delta)
        if policy.probes_running:
            tokens += _probe(probes, episode, chains[number])
        longest = max(longest, tokens)
    return longest


@compiled
def _run(
    policy: Record, intervals: Records, episode: Record, chains: Records, number: int, steps: int, delta: int
) -> int:
    """Run a chain for some intervals, or to its end; return its tokens."""
    chain = chains[number]
    start = chain.start + chain.probes - chain.left
    if steps <= chain.left:
        tokens = steps * delta
        chain.left -= steps
    else:
        steps = chain.left + 1
        tokens = chain.left * delta + max(0, chain.length - chain.probes * delta)
        chain.left, chain.fate, chain.label = -1, IS_FINISHED, chain.final
        episode.finished[episode.finishes] = number
        episode.finishes += 1
        episode.ended += 1
    if policy.pace and policy.reads_intervals and tokens:
        interval = intervals[start]
        _add_signals(chain, tokens * interval.log_confidence[steps - 1], interval.lowest[steps - 1])
    chain.tokens += tokens
    episode.spent += tokens
    return int(tokens)


@compiled
def _add_signals(chain: Record, gained: float, lowest: int) -> None:
    """Add the signals of a fact as `Branch.add_signals` does; `gained` is NaN if they are unknown."""
    if np.isnan(gained) or (np.isnan(chain.log_probability) and chain.tokens):
        chain.log_probability, chain.lowest = nan, UNSEEN_WINDOW
    elif chain.tokens:
        chain.log_probability += gained
        chain.lowest = min(chain.lowest, lowest)
    else:
        chain.log_probability, chain.lowest = gained, lowest


@compiled
def _probe(probes: Records, episode: Record, chain: Record) -> int:
    """Probe a chain; return the cost. A finished one shows its answer at no cost, and keeps its confidence."""
    chain.probed = chain.probes - chain.left
    if chain.left < 0:
        return 0
    probe = probes[chain.probe + chain.probes - chain.left - 1]
    chain.label, chain.probe_confidence = probe.answer, probe.log_confidence
    chain.probe_tokens += probe.tokens
    episode.spent += probe.tokens
    return int(probe.tokens)


@compiled
def _probe_unasked(probes: Records, episode: Record, chains: Records) -> bool:
    """Play a round that probes the active chains whose latest interval was not; return whether there are any."""
    longest, asked = 0, False
    for at in range(episode.actives):
        chain = chains[episode.active[at]]
        if chain.probed < chain.probes - chain.left:
            longest = max(longest, _probe(probes, episode, chain))
            asked = True
    if asked:
        episode.critical_path += longest
        episode.rounds += 1
    return asked


@compiled
def close_round(episode: Record, chains: Records, opened: int, ended: int) -> None:
    """Count the round, and list the active chains anew if some were opened or have ended since it began."""
    episode.rounds += 1
    if episode.opened == opened and episode.ended == ended:
        return
    episode.actives = 0
    for number in range(episode.opened):
        if chains[number].fate == RUNS:
            episode.active[episode.actives] = number
            episode.actives += 1


# The end of an episode


@compiled
def count_deciding_votes(episode: Record, chains: Records, places: Records) -> int:
    """Fill in `polled` with `State.deciding_votes`; return the number of labels."""
    known = 0
    for with_running in range(2):
        begin_votes(episode, places, 0)
        for at in range(episode.opened if with_running else episode.finishes):
            chain = chains[at if with_running else episode.finished[at]]
            if chain.label == NOBODY or chain.fate == IS_PRUNED:
                continue
            place = place_of(episode, places, chain.label, known)
            if place == known:
                episode.polled[place] = 0.0
                known += 1
            episode.polled[place] += 1.0
        if known:
            break
    return known


@compiled
def state_leader(episode: Record, chains: Records, places: Records) -> int:
    """Return the best answer as `State.leader` does."""
    leader = first_most(episode.polled, count_deciding_votes(episode, chains, places))
    return int(episode.labels[leader]) if leader != NOBODY else NOBODY


@compiled
def write_outcome(
    episode: Record, chains: Records, places: Records, answer: int, right: bool, column: NDArray[np.int64]
) -> None:
    """Write the figures of an episode in the order of `OUTCOME_COLUMNS`."""
    column[:] = 0
    column[0], column[2], column[3] = right, episode.spent, episode.rounds
    column[4], column[5] = episode.opened, episode.critical_path
    reply = NOBODY
    for at in range(episode.finishes):
        number = episode.finished[at]
        agrees = answer != NOBODY and chains[number].label == answer
        if agrees and (reply == NOBODY or chains[number].tokens < chains[reply].tokens):
            reply = number
    for number in range(episode.opened):
        chain = chains[number]
        kind = 8  # losing
        if number == reply:
            kind = 6  # winner
        elif chain.fate == IS_PRUNED:
            kind = 9
        elif answer != NOBODY and chain.label == answer:
            kind = 7  # agreeing
        column[kind] += chain.tokens
        column[10] += chain.probe_tokens
    for place in range(count_deciding_votes(episode, chains, places)):
        votes = int(episode.polled[place])
        column[11] += votes
        if episode.labels[place] == answer:
            column[12] = votes
        else:
            column[13] = max(column[13], votes)
