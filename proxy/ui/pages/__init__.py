"""Pages of the dashboard, a module each. `registry.py` lists them.

Imported by the dashboard's app only. Pages import the rest of `proxy.ui`, never each other.
"""
