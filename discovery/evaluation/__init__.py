"""Replay of recorded branches, and the scores and statistics computed from it.

Imported by search, promotion, audit and commands. Imports store and data.
"""

import controllers  # noqa: F401  # before `replay`, which may be compiled
