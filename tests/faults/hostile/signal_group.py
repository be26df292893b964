"""Checks whether it may signal its process group."""

import os


def attack(state):
    return os.killpg(0, 0) or "it may"
