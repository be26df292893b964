"""Commands of `autotts` that show records: requests, traces, searches and the signals of recordings."""
