"""Makes a symbolic link."""

import os


def attack(state):
    return os.symlink("/etc/passwd", f"/tmp/autotts-link-{os.getpid()}") or "made"
