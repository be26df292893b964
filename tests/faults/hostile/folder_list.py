"""Lists the root folder."""

import os


def attack(state):
    return os.listdir("/")
