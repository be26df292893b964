"""Reads its parent's memory."""

import ctypes
import os


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def attack(state):
    buffer = ctypes.create_string_buffer(8)
    local = Vector(ctypes.addressof(buffer), 8)
    remote = Vector(id(state), 8)  # forked from it, so it lies remote too
    libc = ctypes.CDLL(None)
    read = libc.process_vm_readv(os.getppid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return read == 8 and "read"
