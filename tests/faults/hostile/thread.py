"""Starts a thread."""

import _thread


def attack(state):
    return _thread.start_new_thread(int, ())
