"""Soak: mixed traffic on the real stack while everything that can fail does, and a report of what was wrong.

`python -m tests.soak --minutes N` runs cycles: traffic under disturbances, then calm, in which the bills are compared
with vLLM's counters and what the proxy holds is counted.
"""
