"""Waits for a lock that is never released."""

import _thread


def attack(state):
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock.acquire()
