"""Databases of a store: one interface of statements and transactions, over SQLite and PostgreSQL.

Imported by the store and its usage. Statements have `?` for their values; each connection adapts them to its database.
"""
