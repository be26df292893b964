"""Worker processes that share one port: the supervisor that starts them, and what runs in each.

Imported by the command line only. Imports the server, settings and telemetry.
"""
