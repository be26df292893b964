"""Asks for its user id."""

import os


def attack(state):
    return f"user {os.getuid()}"
