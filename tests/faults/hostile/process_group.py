"""Leaves its process group."""

import os


def attack(state):
    return os.setpgid(0, 0) or "left"
