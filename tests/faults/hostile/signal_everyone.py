"""Checks whether it may signal all processes."""

import os


def attack(state):
    return os.kill(-1, 0) or "it may"
