"""Computes forever after its decision is sent."""

import sys

child = sys.modules["controllers.sandbox.process"]
write = child._write


def spin(numbers):
    write(numbers)
    while True:
        pass


def attack(state):
    child._write = spin
