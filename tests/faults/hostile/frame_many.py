"""Claims more actions than there could be."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqq", 16, 3, 1 << 40))
