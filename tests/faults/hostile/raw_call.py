"""Makes one raw system call; the suite fills in its number and arguments."""

import ctypes

NUMBER, ARGUMENTS = 39, ()


def attack(state):
    return ctypes.CDLL(None).syscall(NUMBER, *ARGUMENTS) != -1 and f"call {NUMBER} was made"
