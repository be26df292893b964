"""Prometheus metrics, OpenTelemetry tracing and log lines.

Imported by every folder of the proxy except requests. Imports errors, types and settings.
"""
