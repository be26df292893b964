"""Serve one request with a controller: plan it, run the episode, compose the reply and its bill.

Imported by api and app. Imports everything below them, such as recording and environment.
"""
