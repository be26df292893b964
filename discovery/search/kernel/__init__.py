"""Compiled search kernel: plays episodes of the grammar's policies over arrays, without Python objects.

It needs numba and is imported by the cascade alone. The controller file that a genome gives stays the definition.
"""
