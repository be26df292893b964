"""Sends an advance by a negative number of intervals."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqqq", 24, 3, 1, 1 | 8 | (-5 << 24)))
