"""Checks whether it may signal its parent."""

import os


def attack(state):
    return os.kill(os.getppid(), 0) or "it may"
