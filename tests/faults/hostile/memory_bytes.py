"""Allocates more memory than it may have."""


def attack(state):
    return len(bytearray(256 << 20))
