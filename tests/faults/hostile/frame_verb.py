"""Uses a verb there is not."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqqq", 24, 3, 1, 7))
