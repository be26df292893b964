"""Sends decisions for more episodes than it has."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqqqq", 32, 3, 0, 0, 0))
