"""Serve one request with a controller: the plan, the live environment, votability, the reply and its bill.

Imported by api and app.
"""
