"""Reads what it was not given, for ever."""

import os


def attack(state):
    while os.read(3, 1):
        pass
