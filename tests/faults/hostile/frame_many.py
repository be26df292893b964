"""Claims to send more actions than are possible."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqq", 16, 3, 1 << 40))
