"""Asks which program it is."""

import os


def attack(state):
    return os.readlink("/proc/self/exe")
