"""Fills a list from an iterator that has no end."""


def attack(state):
    return list(iter(int, 1))
