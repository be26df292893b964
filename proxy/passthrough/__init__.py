"""Requests that no controller serves: forwarded to the upstream, with their request ids and their unapplied β.

Imported by api and app.
"""
