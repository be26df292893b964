"""Reads from a null pointer."""

import ctypes


def attack(state):
    return ctypes.string_at(0)
