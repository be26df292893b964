"""Reads its initial environment from /proc."""


def attack(state):
    with open("/proc/self/environ", "rb") as file:
        return b"KEY" in file.read() or "could read"
