"""The bodies that clients send: a model for each endpoint, and checks on their fields.

Imported by admission, passthrough, recording, episode, api and app. Imports errors, types and controllers only.
"""
