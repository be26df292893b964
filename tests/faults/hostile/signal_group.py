"""Sees whether it may signal its group."""

import os


def attack(state):
    return os.killpg(0, 0) or "it may"
