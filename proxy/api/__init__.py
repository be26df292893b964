"""Endpoints in OpenAI's format: chat completions, completions, responses, and the OpenAPI document.

Imported by app only.
"""
