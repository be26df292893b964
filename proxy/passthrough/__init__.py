"""Forward requests that no controller serves, with an index of their request ids and a report of unapplied β.

Imported by api and app.
"""
