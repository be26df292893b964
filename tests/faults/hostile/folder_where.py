"""Asks for its working directory."""

import os


def attack(state):
    return os.getcwd()
