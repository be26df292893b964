"""Asks which folder it is in."""

import os


def attack(state):
    return os.getcwd()
