"""Raises an error whose message contains control characters."""


def attack(state):
    raise ValueError("\x1b]0;owned\x07\x1b[2J\nERROR fake log line")
