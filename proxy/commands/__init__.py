"""Commands of `autotts` that belong to the live side: config, demo, keys and forget.

Imported by cli alone.
"""
