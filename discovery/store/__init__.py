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
    Served,
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
    "Served",
    "Store",
    "Summary",
    "Tried",
    "Verified",
]
