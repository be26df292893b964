"""Puts a handler on the signal it would be killed by."""

import _signal as signal


def attack(state):
    signal.signal(signal.SIGSYS, lambda *_: None)
    return "handled"
