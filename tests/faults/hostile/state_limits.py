"""Gives itself other limits, and opens branches by them."""

import dataclasses

from controllers import branch


class Hostile:
    def __init__(self, beta):
        pass

    def decide(self, state):
        state.limits = dataclasses.replace(state.limits, max_branches=1 << 20)
        return [branch()] * 200
