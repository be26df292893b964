"""Sends a decision before it is asked for one."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqqq", 24, 4, 1, 0))
