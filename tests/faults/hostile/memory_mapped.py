"""Maps more memory than it may have."""

import mmap


def attack(state):
    return len(mmap.mmap(-1, 512 << 20))
