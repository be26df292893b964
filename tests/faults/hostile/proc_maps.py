"""Reads where things lie in its memory."""


def attack(state):
    with open("/proc/self/maps") as file:
        return file.readline()
