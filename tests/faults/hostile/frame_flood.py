"""Writes without end."""

import os


def attack(state):
    while True:
        os.write(3, bytes(1 << 16))
