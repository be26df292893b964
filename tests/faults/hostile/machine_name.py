"""Asks what the machine is called."""

import os


def attack(state):
    return os.uname().nodename
