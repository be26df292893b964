"""Asks the C library for a key, whatever Python was told."""

import ctypes


def attack(state):
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return getenv(b"AUTOTTS_UPSTREAM_API_KEY")
