"""Claims fewer actions than none."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqq", 16, 3, -7))
