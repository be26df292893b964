"""Replay of recorded branches, and the scores and statistics computed from it.

Imported by search, promotion, audit and commands. Imports store and data.
"""
