"""Waits for a lock nobody will open."""

import _thread


def attack(state):
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock.acquire()
