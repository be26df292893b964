"""Aborts."""

import os


def attack(state):
    os.abort()
