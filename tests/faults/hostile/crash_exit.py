"""Leaves without a word."""

import os


def attack(state):
    os._exit(0)
