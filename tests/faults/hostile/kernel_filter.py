"""Removes its system call filter."""

import ctypes


def attack(state):
    return ctypes.CDLL(None).prctl(22, 0, 0, 0, 0) == 0 and "it could"
