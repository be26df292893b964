"""Makes its memory readable by other processes."""

import ctypes


def attack(state):
    return ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0 and "it could"
