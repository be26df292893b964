"""Mounts a file system."""

import ctypes


def attack(state):
    return ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 and "it could"
