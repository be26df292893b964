"""Offline commands of `autotts`, one file each. They raise errors; the command line prints them as one line.

Imported by the command line only.
"""
