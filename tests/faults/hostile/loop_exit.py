"""Raises an error whose message never stops being computed."""


class Endless(Exception):
    def __str__(self):
        while True:
            pass


def attack(state):
    raise Endless
