"""Connections to an upstream: requests that are sent over a pool of them, and the parser of their responses.

Imported by the rest of `proxy/upstream/`. Knows HTTP, and nothing about models or retries.
"""
