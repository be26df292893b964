"""Raises the limits in its copy of the state and opens that many branches."""

import dataclasses

from controllers import branch


class Hostile:
    def __init__(self, beta):
        pass

    def decide(self, state):
        state.limits = dataclasses.replace(state.limits, max_branches=1 << 20)
        return [branch()] * 200
