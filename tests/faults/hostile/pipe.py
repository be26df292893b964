"""Makes a pipe."""

import os


def attack(state):
    return os.pipe()
