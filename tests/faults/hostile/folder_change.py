"""Moves to another folder."""

import os


def attack(state):
    return os.chdir("/usr") or "moved"
