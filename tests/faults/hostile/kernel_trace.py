"""Has itself traced."""

import ctypes


def attack(state):
    return ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0 and "it could"
