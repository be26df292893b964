"""Makes C code recurse without end."""

import sys


def attack(state):
    sys.setrecursionlimit(1 << 30)
    nested = []
    for _ in range(1_000_000):
        nested = [nested]
    return not repr(nested)
