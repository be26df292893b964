"""Makes one system call past Python and the C library; the suite fills in which, and with what."""

import ctypes

NUMBER, ARGUMENTS = 39, ()


def attack(state):
    return ctypes.CDLL(None).syscall(NUMBER, *ARGUMENTS) != -1 and f"call {NUMBER} was made"
