"""Becomes root."""

import os


def attack(state):
    os.setresuid(0, 0, 0)
    return "root"
