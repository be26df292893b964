"""Asks for memory it may write and run."""

import mmap


def attack(state):
    return mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
