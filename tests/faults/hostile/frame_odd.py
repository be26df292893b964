"""Sends a frame whose size is not a multiple of 8 bytes."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=I", 13) + bytes(13))
