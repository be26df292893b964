"""Check and explain served episodes: why they stopped, and whether replay agrees with them.

Imported by commands and the proxy.
"""
