"""Makes memory executable afterwards."""

import ctypes
import mmap


def attack(state):
    memory = mmap.mmap(-1, 4096)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), 4096, 7) == 0 and "executable"
