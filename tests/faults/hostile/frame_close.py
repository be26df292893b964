"""Closes its end."""

import os


def attack(state):
    os.close(3)
