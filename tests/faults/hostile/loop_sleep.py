"""Sleeps."""

import time


def attack(state):
    time.sleep(60)
    return "slept"
