"""Announces a frame of two gigabytes."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=I", 2 << 30))
