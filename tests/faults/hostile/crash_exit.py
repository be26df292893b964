"""Exits without a message."""

import os


def attack(state):
    os._exit(0)
