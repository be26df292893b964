"""Replaces what packs its frames by something a thousand times as large."""

import sys


def attack(state):
    child = sys.modules["controllers.sandbox.process"]
    child.pack = lambda numbers: (4 << 20).to_bytes(4, "little") + bytes(4 << 20)
