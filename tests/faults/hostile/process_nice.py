"""Changes its priority."""

import os


def attack(state):
    return os.nice(1)
