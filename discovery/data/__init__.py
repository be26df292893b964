"""Recordings, questions and traces as data: reading, writing, collecting and mapping them into memory.

Imported by every folder above it. Imports answers and errors.
"""
