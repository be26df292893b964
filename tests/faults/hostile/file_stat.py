"""Asks what a file is."""

import os


def attack(state):
    return os.stat("/etc/passwd")
