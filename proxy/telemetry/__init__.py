"""Prometheus metrics, OpenTelemetry spans and metrics, and log lines.

Imported by every folder of the proxy except requests. Imports errors, types and settings.
"""
