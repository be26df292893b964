"""Sets a timer."""

import _signal as signal


def attack(state):
    signal.setitimer(signal.ITIMER_REAL, 60)
    return "set"
