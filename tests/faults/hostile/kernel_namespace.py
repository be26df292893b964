"""Moves to a namespace where it would be root."""

import ctypes


def attack(state):
    return ctypes.CDLL(None).unshare(0x10000000) == 0 and "it could"
