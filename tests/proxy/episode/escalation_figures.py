"""Measure on public recordings what flags and escalation are worth: `python -m tests.proxy.episode.escalation_figures`.

It prints the table of docs/calibration.md, in about ten seconds. The baseline serves, with a least agreement of 0.7.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers import Limits, State, run_episode, run_sync
from controllers.builtin import BASELINE, create
from controllers.voting import agreement
from discovery.data.recordings import Recording
from discovery.evaluation.calibration import reliability
from discovery.evaluation.evaluate import AnswerComparison, read_scorable_cell
from discovery.evaluation.paired_statistics import bootstrap_bounds
from discovery.evaluation.replay import ReplayEnvironment, branch_order
from discovery.evaluation.scores import BOTH_SIDES
from discovery.evaluation.sources import open_source
from proxy.rollout.escalation import AgreementCheck, AnswerHeldBackError
from proxy.types import AgreementRule, Otherwise

RECORDINGS: Final = Path(__file__).parents[4] / "shared" / "replay" / "autotts"
SHUFFLES: Final = 5
RULE: Final = AgreementRule(0.7, Otherwise.ESCALATE, 1.0)


class Outcome(NamedTuple):
    """Correctness and cost of one episode."""

    question: int
    right: bool
    tokens: int
    flagged: bool


async def play(recording: Recording, question: int, shuffle: int, beta: float, escalates: bool) -> Outcome:
    environment = ReplayEnvironment(recording, branch_order(recording, shuffle))
    state = State(Limits(recording.interval, recording.branches))
    checked = AgreementCheck(environment, state, RULE) if escalates else environment
    try:
        await run_episode(create(BASELINE, beta), checked, state)
    except AnswerHeldBackError:
        await run_episode(create(BASELINE, RULE.escalate_beta or 1.0), environment, state)
    flagged = not RULE.is_met(agreement(state.deciding_votes(), state.answer))
    return Outcome(question, environment.is_right(state.answer), state.spent, flagged)


def shown_accuracy(outcomes: Sequence[Outcome]) -> str:
    """Return the accuracy and its bootstrap interval over questions."""
    means = [np.mean([one.right for one in outcomes if one.question == at]) for at in range(outcomes[-1].question + 1)]
    low, high = bootstrap_bounds(100 * np.array(means), BOTH_SIDES)
    return f"{100 * np.mean(means):.1f} ({low:.0f} to {high:.0f})"


def shown_right(outcomes: Sequence[Outcome]) -> str:
    """Return the share of right answers among some episodes, with the interval of reliability tables."""
    if not outcomes:
        return "-"
    right, questions = (
        np.array(values) for values in zip(*((one.right, one.question) for one in outcomes), strict=True)
    )
    ones: NDArray[np.float64] = np.ones(len(outcomes))
    (known,) = reliability(ones, right.astype(np.int64), questions).bins
    return f"{known.accuracy:.0f} ({known.low:.0f} to {known.high:.0f})"


def main() -> None:
    """Print a row for each model."""
    source = open_source(RECORDINGS)
    for cell in (cell for cell in source.cells() if cell.benchmark == "aime24"):
        recordings, _ = read_scorable_cell(source, cell, AnswerComparison.AUTO)
        ways = {
            way: [
                run_sync(play(recording, question, shuffle, *way))
                for question, recording in enumerate(recordings)
                for shuffle in range(SHUFFLES)
            ]
            for way in ((0.3, False), (0.3, True), (1.0, False))
        }
        figures = [
            f"{shown_accuracy(outcomes)}, {np.mean([one.tokens for one in outcomes]):,.0f}"
            for outcomes in ways.values()
        ]
        plain = ways[0.3, False]
        flagged = [one for one in plain if one.flagged]
        shares = f"{100 * len(flagged) / len(plain):.0f} %"
        split = [shares, shown_right(flagged), shown_right([one for one in plain if not one.flagged])]
        sys.stdout.write(f"| {' | '.join([cell.model, *split, *figures])} |\n")


if __name__ == "__main__":
    main()
