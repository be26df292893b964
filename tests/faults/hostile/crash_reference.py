"""Releases references that it does not own."""

import ctypes


def attack(state):
    for _ in range(1000):
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(None))
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(type))
