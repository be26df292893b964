"""Sends a frame a byte at a time, to look alive."""

import os
import struct


def attack(state):
    frame = struct.pack("=I", 1 << 20) + bytes(1 << 20)
    for at in range(len(frame)):
        os.write(3, frame[at : at + 1])
        for _ in range(100_000):
            pass
