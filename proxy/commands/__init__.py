"""Commands of `autotts` that belong to the proxy: config, demo, keys and forget.

Imported by cli only.
"""
