"""Floods its standard output and error."""

import os


def attack(state):
    for _ in range(200):
        os.write(1, bytes(1 << 18))
        os.write(2, bytes(1 << 18))
