"""Serve one request with a controller: the plan, the run, the reply and its bill.

Imported by api and app.
"""
