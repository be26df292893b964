"""Models of what clients send, and the checks on their fields.

Imported by admission, passthrough, episode, api and app. Imports only errors and types.
"""
