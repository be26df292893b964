"""Chooses its cores."""

import os


def attack(state):
    return os.sched_setaffinity(0, {0}) or "chosen"
