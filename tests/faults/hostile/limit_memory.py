"""Raises its limit of memory."""

import resource


def attack(state):
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
    return "raised"
