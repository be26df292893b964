"""Calls itself for ever, having lifted the interpreter's own limit."""

import sys


def attack(state):
    sys.setrecursionlimit(1 << 30)
    return attack(state)
