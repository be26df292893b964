"""Reads a file everyone may read."""


def attack(state):
    with open("/etc/passwd") as file:
        return file.readline()
