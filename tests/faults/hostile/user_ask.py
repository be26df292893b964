"""Asks who it is."""

import os


def attack(state):
    return f"user {os.getuid()}"
