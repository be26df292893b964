"""Replaces the function that packs its frames by one that makes frames of 4 MiB."""

import sys


def attack(state):
    child = sys.modules["controllers.sandbox.process"]
    child.pack = lambda numbers: (4 << 20).to_bytes(4, "little") + bytes(4 << 20)
