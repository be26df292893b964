"""The replay store: questions, recordings, episodes, feedback, labels and searches, in SQLite or PostgreSQL.

Imported by every folder above it and the proxy. Imports data and errors.
"""

from discovery.store.databases.places import DatabaseUrl, StorePlace, child_environment, parse_place
from discovery.store.records import (
    MAX_PROMPTS,
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
    prompt_name,
)
from discovery.store.replay_store import Store

__all__ = [
    "MAX_PROMPTS",
    "AddedCounts",
    "CellSummary",
    "DatabaseUrl",
    "EpisodeDetails",
    "Feedback",
    "ForgottenCounts",
    "Label",
    "SearchRun",
    "ServedEpisode",
    "ServedSummary",
    "Store",
    "StoreItem",
    "StorePlace",
    "TriedCandidate",
    "VerificationReport",
    "child_environment",
    "parse_place",
    "prompt_name",
]
