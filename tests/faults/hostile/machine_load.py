"""Asks how busy the machine is."""

import os


def attack(state):
    return os.getloadavg()
