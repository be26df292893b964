"""Copies a descriptor."""

import os


def attack(state):
    return os.dup(3)
