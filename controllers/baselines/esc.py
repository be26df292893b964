"""Early-stopping self-consistency (Li et al., arXiv 2401.10480): sample in windows until all answers of one agree."""

from __future__ import annotations

from controllers.actions import TO_END, Action, advance, answer, branch
from controllers.dial import chains
from controllers.state import State

WINDOW = 8  # the published setting


class EarlyStopping:
    """At most N chains, N from 1 at β = 0 to 64 at β = 1, a window of them at a time; the majority of all answers.

    A window without readable answers does not agree.
    """

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)
        self.window = 0  # first chain of the present window

    def decide(self, state: State) -> list[Action]:
        if state.active:  # the token limit ended their previous run early
            return [advance(i, TO_END) for i in state.active]
        labels = {chain.label for chain in state.branches[self.window :]}
        more = min(WINDOW, self.samples - state.width, state.room)
        if more <= 0 or (len(labels) == 1 and None not in labels and state.width - self.window == WINDOW):
            return [answer(state.leader())]
        self.window = state.width
        return [branch(TO_END)] * more
