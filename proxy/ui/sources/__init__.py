"""Sources of pages besides the store: files that the offline commands write, and the commands that write them.

Imported by pages. Imports the rest of `proxy.ui` and everything below it.
"""
