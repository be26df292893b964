"""Reads random bytes from the kernel."""

import os


def attack(state):
    return os.urandom(8)
