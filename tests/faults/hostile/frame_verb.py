"""Sends an action of an unknown kind."""

import os
import struct


def attack(state):
    os.write(3, struct.pack("=Iqqq", 24, 3, 1, 7))
