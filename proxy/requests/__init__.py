"""The bodies that clients send: a model for each endpoint, and checks on their fields.

Imported by admission, passthrough, recording, episode and api. Of the proxy it imports errors and types only.
"""
