"""Runs a shell."""

import os


def attack(state):
    return os.system("exit 7") == 7 << 8 and "a shell ran"
