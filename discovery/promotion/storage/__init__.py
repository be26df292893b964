"""Where the registry and the gate's ledger are kept: files, or tables of a PostgreSQL database.

Imported by the modules of `discovery/promotion/`, and by the proxy, which follows changes. Imports store and data.
"""
