"""Starts a session of its own."""

import os


def attack(state):
    return os.setsid()
