"""Sets an alarm signal."""

import _signal as signal


def attack(state):
    signal.alarm(1)
    return signal.alarm(0)
