"""Formats of the generation endpoints: whole responses and streams of chat completions, completions and Responses.

Imported by the endpoints of proxy/api alone.
"""
