"""The replay store: questions, recordings, episodes, feedback and searches, in SQLite."""

from discovery.store.rows import Added, Episode, Feedback, Search, Summary, Tried, Verified
from discovery.store.sqlite import Store

__all__ = ["Added", "Episode", "Feedback", "Search", "Store", "Summary", "Tried", "Verified"]
