"""Episodes of `controllers.baselines.adaptive_consistency`, which every candidate is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from discovery.search.kernel.episode import (
    advance,
    begin_episode,
    close_round,
    open_chains,
    repeat_rounds,
    state_leader,
    write_outcome,
)
from discovery.search.kernel.jit import compiled
from discovery.search.kernel.records import IS_FINISHED, NOBODY, Record, Records
from discovery.search.kernel.stop_rules import gain, top_two
from discovery.search.kernel.votes import begin_votes, first_most, place_of

UNKNOWN_YET, ENDS, WIDENS, UNDECIDED = range(4)
"""Decisions after a wave, as `what_follows` in the controller returns them, and none yet."""


@compiled
def play_waves(
    waves: Records,
    plain: Records,
    questions: Records,
    branches: Records,
    probes: Records,
    intervals: Records,
    every: int,
    orders: NDArray[np.int64],
    episodes: Records,
    chains: Records,
    places: Records,
    decisions: NDArray[np.int8],
    outcomes: NDArray[np.int64],
    answers: NDArray[np.int64],
) -> None:
    """Play every n-th question with every record of `waves` and under every order, like `play`.

    `plain` has a blank policy. `decisions` is overwritten: (waves of an episode, first, second votes, unfinished).
    """
    episode = episodes[0]
    for number in range(len(waves)):
        decided_most = -1
        for shuffle in range(orders.shape[1]):
            for at in range(answers.shape[2]):
                question = questions[at * every]
                most = min(waves[number].samples, question.width)
                if most != decided_most:  # decisions depend on it, and on β
                    decided_most = most
                    decisions[:] = UNKNOWN_YET
                order = orders[question.order, shuffle]
                begin_episode(episode)
                answer = _play_episode(
                    waves[number],
                    plain[0],
                    branches,
                    probes,
                    intervals,
                    episode,
                    chains,
                    places,
                    decisions,
                    question,
                    order,
                    most,
                )
                answers[number, shuffle, at] = answer
                right = answer != NOBODY and answer == question.reference
                write_outcome(episode, chains, places, answer, right, outcomes[number, :, shuffle, at])


@compiled
def _play_episode(
    wave: Record,
    plain: Record,
    branches: Records,
    probes: Records,
    intervals: Records,
    episode: Record,
    chains: Records,
    places: Records,
    decisions: NDArray[np.int8],
    question: Record,
    order: NDArray[np.int64],
    most: int,
) -> int:
    """Play one episode; return the answer's number, or NOBODY."""
    delta, running = question.interval, 0
    decided_finishes, decided_opened = -1, -1
    while True:
        opened, ended, missing = episode.opened, episode.ended, 0
        if episode.finishes != decided_finishes or opened != decided_opened:
            decided_finishes, decided_opened = episode.finishes, opened
            size, number = min(wave.first, most), 0
            while True:
                winner, running, follows = _decide(wave, episode, chains, places, decisions, size, number, most)
                if follows != WIDENS:
                    break
                size, number = min(2 * size, most), number + 1
            if follows == ENDS:
                episode.rounds += 1
                return winner if winner != NOBODY else state_leader(episode, chains, places)
            missing = max(0, size - opened)
        else:
            repeat_rounds(episode, chains, running, delta)
        longest = advance(plain, probes, intervals, episode, chains, NOBODY, running, delta)
        started = open_chains(plain, branches, intervals, episode, chains, question, order, missing)
        episode.critical_path += max(longest, started)
        close_round(episode, chains, opened, ended)


@compiled
def _decide(
    wave: Record,
    episode: Record,
    chains: Records,
    places: Records,
    decisions: NDArray[np.int8],
    size: int,
    number: int,
    most: int,
) -> tuple[int, int, int]:
    """Return the leader of the first `size` chains, how many of them are running, and what follows."""
    begin_votes(episode, places, 0)
    known, running = 0, 0
    for at in range(min(size, episode.opened)):
        chain = chains[at]
        if chain.fate != IS_FINISHED:
            episode.running[running] = at
            running += 1
        elif chain.label != NOBODY:
            place = place_of(episode, places, chain.label, known)
            if place == known:
                episode.votes[place] = 0.0
                known += 1
            episode.votes[place] += 1.0
    first, second = top_two(episode.votes, known)
    unfinished = running + max(0, size - episode.opened)
    key = number, int(first), int(second), unfinished
    if decisions[key] == UNKNOWN_YET:
        decisions[key] = _follows(first, second, unfinished, size, most - size, wave.least, wave.worth)
    leader = first_most(episode.votes, known)
    return int(episode.labels[leader]) if leader != NOBODY else NOBODY, running, int(decisions[key])


@compiled
def _follows(first: float, second: float, unfinished: int, sampled: int, left: int, agreeing: int, worth: float) -> int:
    """Return what follows a wave, as `what_follows` in the controller does."""
    has_winner = unfinished == 0 or first > second + unfinished
    if left == 0:
        return ENDS if has_winner else UNDECIDED
    enough, total = 0, 0
    for more in range(unfinished + 1):
        for others in range(unfinished - more + 1):
            most, least = max(first + more, second + others), min(first + more, second + others)
            enough += most >= agreeing and gain(most, least, float(sampled), float(left)) < worth
            total += 1
    if enough == 0:
        return WIDENS
    return ENDS if enough == total and has_winner else UNDECIDED
