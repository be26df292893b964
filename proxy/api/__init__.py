"""Endpoints of the proxy: generation, models, status, feedback and forwarding, and their OpenAPI document.

Imported by app only.
"""
