"""Replaces the encoder of its decisions."""

import sys


def attack(state):
    child = sys.modules["controllers.sandbox.child"]
    child.encode = lambda action: -(1 << 60)
