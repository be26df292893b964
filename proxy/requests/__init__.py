"""Request bodies: a model for each endpoint, and checks of their fields.

Imported by admission, passthrough, recording, episode and api. Of the proxy it imports errors and types only.
"""
