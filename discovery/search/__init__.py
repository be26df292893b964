"""Search for controllers: explorers propose, the cascade judges, the loop records what happened.

Imported by commands alone.
"""
