"""Reference for replay speed: CMC, as its paper describes it, in one bare loop over plain lists.

The loop has no actions, facts, state or legality checks, cannot run live, and returns only the two figures that are
compared. The additional time of the general runner is the cost of its generality.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import comb

from discovery.data.recordings import BranchRow, Recording


@cache
def confidence(first: int, second: int) -> float:
    """Return 1 - BetaCDF(1/2; first + 1, second + 1)."""
    trials = first + second + 1
    return sum(comb(trials, k) for k in range(first + 1)) / 2**trials if first else 0.0


def forwards(recording: Recording) -> list[BranchRow]:
    """Return the rows of a recording with probes in the order in which they were made."""
    return [row._replace(probes=row.probes[::-1]) for row in recording.rows]


def play(rows: Sequence[BranchRow], order: Sequence[int], delta: int, b: float) -> tuple[int, int]:
    """Play one episode of CMC at β = `b`; return the number of its answer in the recording, and its tokens."""
    first, most, warm_up = max(2, round(2 + 6 * b)), min(64, round(4 + 60 * b)), max(2, round(2 + 8 * b))
    patience, size, alpha = max(3, round(3 + 9 * b)), max(2, round(2 + 6 * b)), 0.70 - 0.40 * b
    threshold, slack, trend = 0.85 + 0.12 * b, 0.04 - 0.03 * b, 0.04 - 0.03 * b
    burst, widen, complete = max(1, round(1 + 2 * b)), max(1, round(1 + 3 * b)), max(2, round(2 + 3 * b))
    chains: list[Sequence[int]] = []
    rests: list[int] = []
    finals: list[int] = []
    at: list[int] = []  # intervals run
    latest: list[int] = []
    strayed: list[int] = []
    running: list[int] = []
    pool: dict[int, int] = {}  # votes of finished chains
    finished = spent = 0
    average = 0.0
    window: list[float] = []

    def step(i: int, times: int) -> None:
        nonlocal finished, spent
        chain, now = chains[i], at[i]
        ran = min(times, len(chain) - now)
        if ran:
            at[i] = now + ran
            latest[i] = chain[now + ran - 1]
            spent += ran * delta
        if ran < times:
            spent += rests[i]
            finished += 1
            pool[finals[i]] = pool.get(finals[i], 0) + 1
            running.remove(i)

    def open_one() -> None:
        row = rows[order[len(chains)]]
        chains.append(row.probes)  # earliest probe first, see `forwards`
        rests.append(max(0, row.tokens - delta * len(row.probes)))
        finals.append(row.final)
        at.append(0)
        latest.append(-1)
        strayed.append(0)
        running.append(len(chains) - 1)
        step(len(chains) - 1, 1)

    def vote() -> tuple[int | None, float]:
        if not pool:
            return None, 0.0
        winner = max(pool, key=pool.__getitem__)
        return winner, confidence(pool[winner], max((n for label, n in pool.items() if label != winner), default=0))

    for _ in range(first):
        open_one()
    for t in range(500):
        winner, sure = vote()
        average = (1 - alpha) * average + alpha * sure
        window = [*window, average][-size:]
        agreeing: set[int] = set()
        if t >= warm_up and winner is not None:
            strays = []
            for i in running:
                if latest[i] == winner:
                    strayed[i] = 0
                    agreeing.add(i)
                else:
                    strayed[i] += 1
                    if strayed[i] >= patience:
                        strays.append(i)
            strays.sort(key=lambda i: -strayed[i])
            for i in strays[: max(0, len(running) - 2)]:
                running.remove(i)
        for i in running[:]:
            step(i, burst if i in agreeing else 1)
        winner, sure = vote()
        average = (1 - alpha) * average + alpha * sure
        window[-1] = average
        rise = window[-1] - window[0]
        if t >= warm_up and finished >= complete and average >= threshold and rise >= -slack:
            break
        if not running:
            break
        if len(chains) < most and rise <= trend and t >= max(1, warm_up // 2) and average < threshold:
            for _ in range(min(widen, most - len(chains))):
                open_one()
    if not pool:
        for label in latest:
            pool[label] = pool.get(label, 0) + 1
    return max(pool, key=pool.__getitem__), spent
