"""The replay store: questions, recordings, episodes and feedback, in SQLite."""

from discovery.store.rows import Added, Episode, Feedback, Summary, Verified
from discovery.store.sqlite import Store

__all__ = ["Added", "Episode", "Feedback", "Store", "Summary", "Verified"]
