"""Asks to outlive its parent."""

import ctypes


def attack(state):
    return ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0 and "it could"
