"""Forks twenty times."""

import os


def attack(state):
    children = 0
    for _ in range(20):
        if os.fork() == 0:
            os._exit(0)
        children += 1
    return f"{children} children"
