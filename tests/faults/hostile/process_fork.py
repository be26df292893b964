"""Forks."""

import os


def attack(state):
    return os.fork() or os._exit(0)
