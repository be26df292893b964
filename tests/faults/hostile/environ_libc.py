"""Reads a key with the C library's `getenv`, past Python's `os.environ`."""

import ctypes


def attack(state):
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return getenv(b"AUTOTTS_UPSTREAM_API_KEY")
