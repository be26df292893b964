"""Makes a folder."""

import os


def attack(state):
    return os.mkdir(f"/tmp/autotts-hostile-{os.getpid()}") or "made"
