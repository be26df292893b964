"""Reads the environment it was started with."""


def attack(state):
    with open("/proc/self/environ", "rb") as file:
        return b"KEY" in file.read() or "could read"
