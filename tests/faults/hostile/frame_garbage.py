"""Sends meaningless bytes over the channel."""

import os


def attack(state):
    os.write(3, b"\xff" * 64)
