"""Reads its standard input."""

import os


def attack(state):
    return os.read(0, 1)
