"""Reads where nothing is."""

import ctypes


def attack(state):
    return ctypes.string_at(0)
