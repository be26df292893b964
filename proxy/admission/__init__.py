"""Decide whether a request may run: authentication, API keys, token budgets, the fair queue and load shedding.

Imported by passthrough, recording, episode, api and app.
"""
