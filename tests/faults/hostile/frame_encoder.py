"""Replaces the encoder of its decisions."""

import sys


def attack(state):
    child = sys.modules["controllers.sandbox.process"]
    child.encode_actions = lambda actions: [1, -(1 << 60)]
