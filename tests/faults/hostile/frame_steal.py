"""Reads from the channel without end."""

import os


def attack(state):
    while os.read(3, 1):
        pass
