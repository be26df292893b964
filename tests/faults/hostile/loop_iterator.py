"""Looks for something true in an iterator that has no end."""


def attack(state):
    return any(iter(int, 1))
