"""Closes its end of the channel."""

import os


def attack(state):
    os.close(3)
