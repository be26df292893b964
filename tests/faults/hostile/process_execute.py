"""Replaces itself by another program."""

import os


def attack(state):
    return os.execv("/bin/sh", ["sh", "-c", "exit 0"])
