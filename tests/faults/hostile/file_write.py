"""Leaves a file behind."""


def attack(state):
    with open("/tmp/autotts-hostile", "w") as file:
        return file.write("here")
