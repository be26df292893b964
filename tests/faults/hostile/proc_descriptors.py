"""Lists its parent's open files."""

import os


def attack(state):
    return os.listdir(f"/proc/{os.getppid()}/fd") or "none open"
