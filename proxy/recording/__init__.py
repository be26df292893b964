"""Record served episodes: the log, the writer to the store, the spill file, and branches completed in the background.

Imported by episode and app.
"""
