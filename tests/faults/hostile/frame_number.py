"""Sends a reply with the number of another request."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqq", 16, 1 << 40, 0))
