"""Announces a frame of no whole number of numbers."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=I", 13) + bytes(13))
