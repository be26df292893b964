"""The replay store: questions, recordings, episodes, feedback and searches, in SQLite."""

from discovery.store.rows import (
    About,
    Added,
    Episode,
    Feedback,
    Forgotten,
    Item,
    Label,
    Search,
    Summary,
    Tried,
    Verified,
)
from discovery.store.sqlite import Store

__all__ = [
    "About",
    "Added",
    "Episode",
    "Feedback",
    "Forgotten",
    "Item",
    "Label",
    "Search",
    "Store",
    "Summary",
    "Tried",
    "Verified",
]
