"""Makes a file that lies in memory."""

import os


def attack(state):
    return os.memfd_create("hostile")
