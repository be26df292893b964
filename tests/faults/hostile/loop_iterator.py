"""Searches an endless iterator for a true value."""


def attack(state):
    return any(iter(int, 1))
