"""Sees whether it may signal everyone."""

import os


def attack(state):
    return os.kill(-1, 0) or "it may"
