"""Looks for open descriptors beside its own."""

import os


def attack(state):
    return [number for number in range(4, 4096) if opened(number)]


def opened(number):
    try:
        os.write(number, b"")
    except OSError:
        return False
    return True
