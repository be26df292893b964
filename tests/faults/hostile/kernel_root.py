"""Changes its root."""

import ctypes


def attack(state):
    return ctypes.CDLL(None).chroot(b"/tmp") == 0 and "it could"
