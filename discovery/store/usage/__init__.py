"""Usage: what served episodes cost, per episode and per hour, kept beside the episodes and read by the dashboard.

Its tables are derived from `episodes`: facts in the transactions that change them, sums once an hour has ended. Imports
connections, statements, schema and records.
"""
