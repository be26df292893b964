"""Changes its copy of the state, so that all branches look free and finished."""


def attack(state):
    state.spent = -(1 << 60)
    state.rounds = 0
    for branch in state.branches:
        branch.tokens = 0
