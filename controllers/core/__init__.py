"""Core of an episode that can be compiled: types of actions and facts, and the loader of compiled modules.

Imported by every module of controllers, and by discovery. Imports errors and signals.
"""
