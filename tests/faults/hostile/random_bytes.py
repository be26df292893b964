"""Asks the kernel for chance."""

import os


def attack(state):
    return os.urandom(8)
