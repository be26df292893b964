"""Announces a longer frame than it sends, and waits."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=I", 800))
    os.read(3, 1)
