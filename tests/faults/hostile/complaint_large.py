"""Raises an error with a message of 8 MiB."""


def attack(state):
    raise ValueError("x" * (8 << 20))
