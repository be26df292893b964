"""Answers before it is asked."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqqq", 24, 4, 1, 0))
