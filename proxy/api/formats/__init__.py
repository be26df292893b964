"""Formats of the generation endpoints: JSON responses and streams of chat completions, completions and Responses.

Imported by the endpoints of proxy/api only.
"""
