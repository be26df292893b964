"""Decide whether a finalist is better than the champion, and keep the registry of installed controllers.

Imported by commands and the proxy, and its conditions by the search, which tells explorers about them.
"""
