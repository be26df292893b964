"""Recurses without end after raising the interpreter's recursion limit."""

import sys


def attack(state):
    sys.setrecursionlimit(1 << 30)
    return attack(state)
