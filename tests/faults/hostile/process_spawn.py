"""Has the C library start a program."""

import os


def attack(state):
    return os.posix_spawn("/bin/sh", ["sh", "-c", "exit 0"], {})
