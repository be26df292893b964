"""Looks for keys in its environment."""

import os


def attack(state):
    return [name for name in os.environ if "KEY" in name]
