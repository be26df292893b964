"""Changes its parent's limits."""

import os
import resource


def attack(state):
    return resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)
