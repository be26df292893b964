"""Claims to send a negative number of actions."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqq", 16, 3, -7))
