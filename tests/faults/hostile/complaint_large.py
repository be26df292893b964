"""Complains at length."""


def attack(state):
    raise ValueError("x" * (8 << 20))
