"""Reads the metadata of a file."""

import os


def attack(state):
    return os.stat("/etc/passwd")
