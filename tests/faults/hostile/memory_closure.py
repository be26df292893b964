"""Has ctypes make machine code for a callback."""

import ctypes


def attack(state):
    return ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 7)() == 7 and "code was made"
