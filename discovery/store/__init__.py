"""The replay store: questions, recordings, episodes, feedback, labels and searches, in SQLite.

Imported by every folder above it and the proxy. Imports data and errors.
"""

from discovery.store.records import (
    AddedCounts,
    CellSummary,
    EpisodeDetails,
    Feedback,
    ForgottenCounts,
    Label,
    SearchRun,
    ServedEpisode,
    ServedSummary,
    StoreItem,
    TriedCandidate,
    VerificationReport,
)
from discovery.store.sqlite import Store

__all__ = [
    "AddedCounts",
    "CellSummary",
    "EpisodeDetails",
    "Feedback",
    "ForgottenCounts",
    "Label",
    "SearchRun",
    "ServedEpisode",
    "ServedSummary",
    "Store",
    "StoreItem",
    "TriedCandidate",
    "VerificationReport",
]
