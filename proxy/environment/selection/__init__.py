"""Select one of several whole replies by their texts: a call of the same model that judges them, and word overlap.

The vote decides first; this decides among texts that have no vote. Imported by the modules of `proxy.environment` and
by `proxy.episode`.
"""
