"""Sends what means nothing."""

import os


def attack(state):
    os.write(3, b"\xff" * 64)
