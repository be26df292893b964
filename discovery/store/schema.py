"""The store's tables, as a sequence of migrations. A store is brought up to date when it is opened.

Statements are written as SQLite takes them; `adapt_schema` of a connection adapts them to PostgreSQL. Every row ends in
a checksum over its other columns, in this order. Only tables that can be made anew from others have none.
Times are UTC in ISO 8601.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

Migration = Sequence[str]

FIRST: Final[Migration] = (
    """CREATE TABLE questions (
        id TEXT PRIMARY KEY,
        split TEXT NOT NULL,
        reference TEXT,
        label_source TEXT NOT NULL,
        body TEXT,
        added TEXT NOT NULL,
        checksum TEXT NOT NULL
    )""",
    """CREATE TABLE recordings (
        id TEXT PRIMARY KEY,
        number BIGINT NOT NULL UNIQUE,
        question_id TEXT NOT NULL REFERENCES questions (id),
        model TEXT NOT NULL,
        benchmark TEXT NOT NULL,
        sampling TEXT NOT NULL,
        delta INTEGER NOT NULL,
        probe_template TEXT NOT NULL,
        origin TEXT NOT NULL,
        complete INTEGER NOT NULL,
        branches INTEGER NOT NULL,
        added TEXT NOT NULL,
        checksum TEXT NOT NULL
    )""",
    "CREATE INDEX recordings_of ON recordings (model, benchmark)",
    """CREATE TABLE branches (
        recording_id TEXT NOT NULL REFERENCES recordings (id),
        number INTEGER NOT NULL,
        tokens BIGINT NOT NULL,
        complete INTEGER NOT NULL,
        final TEXT,
        probes TEXT NOT NULL,
        probe_tokens TEXT NOT NULL,
        checksum TEXT NOT NULL,
        PRIMARY KEY (recording_id, number)
    )""",
    """CREATE TABLE episodes (
        id TEXT PRIMARY KEY,
        request_id TEXT NOT NULL,
        question_id TEXT,
        model TEXT NOT NULL,
        controller TEXT NOT NULL,
        digest TEXT NOT NULL,
        beta DOUBLE PRECISION NOT NULL,
        rounds INTEGER NOT NULL,
        branches INTEGER NOT NULL,
        ledger TEXT NOT NULL,
        stop TEXT NOT NULL,
        answer TEXT,
        created TEXT NOT NULL,
        checksum TEXT NOT NULL
    )""",
    "CREATE INDEX episodes_of ON episodes (request_id)",
    """CREATE TABLE feedback (
        id TEXT PRIMARY KEY,
        request_id TEXT NOT NULL,
        kind TEXT NOT NULL,
        value TEXT NOT NULL,
        created TEXT NOT NULL,
        checksum TEXT NOT NULL
    )""",
    "CREATE INDEX feedback_of ON feedback (request_id)",
)

SANDBOX: Final[Migration] = (
    # No program of the first version wrote episodes, so no checksums need to be recomputed.
    "ALTER TABLE episodes ADD COLUMN sandbox TEXT NOT NULL DEFAULT 'trusted'",
)

RUNS: Final[Migration] = (
    """CREATE TABLE runs (
        id TEXT PRIMARY KEY,
        explorer TEXT NOT NULL,
        seed BIGINT NOT NULL,
        settings TEXT NOT NULL,
        candidates INTEGER NOT NULL,
        created TEXT NOT NULL,
        checksum TEXT NOT NULL
    )""",
    """CREATE TABLE candidates (
        id TEXT PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs (id),
        digest TEXT NOT NULL,
        name TEXT NOT NULL,
        explorer TEXT NOT NULL,
        parent TEXT,
        score DOUBLE PRECISION,
        failure TEXT NOT NULL,
        usd DOUBLE PRECISION NOT NULL,
        source TEXT NOT NULL,
        checksum TEXT NOT NULL
    )""",
    "CREATE INDEX candidates_of ON candidates (run_id)",
)

LIVE: Final[Migration] = (
    # No program of an earlier version wrote episodes or feedback, so no checksums need to be recomputed.
    "ALTER TABLE episodes ADD COLUMN tenant TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE episodes ADD COLUMN about TEXT NOT NULL DEFAULT '{}'",
    "ALTER TABLE episodes ADD COLUMN trace TEXT NOT NULL DEFAULT ''",
    "CREATE INDEX episodes_by_age ON episodes (created)",
    "ALTER TABLE feedback ADD COLUMN tenant TEXT NOT NULL DEFAULT ''",
    # Origin of recordings made by a proxy; imported recordings have none.
    """CREATE TABLE provenance (
        recording_id TEXT PRIMARY KEY REFERENCES recordings (id),
        chat_template TEXT NOT NULL,
        request_id TEXT NOT NULL,
        checksum TEXT NOT NULL
    )""",
    "CREATE INDEX provenance_of ON provenance (request_id)",
    # Reference answers, one per question and source. Readers decide which of them counts.
    """CREATE TABLE labels (
        id TEXT PRIMARY KEY,
        question_id TEXT NOT NULL,
        source TEXT NOT NULL,
        answer TEXT NOT NULL,
        confidence DOUBLE PRECISION NOT NULL,
        margin DOUBLE PRECISION,
        created TEXT NOT NULL,
        checksum TEXT NOT NULL
    )""",
    "CREATE INDEX labels_of ON labels (question_id)",
    # Hashes of request ids and tenants that must not be added again, by a spill file or a second proxy.
    "CREATE TABLE forgotten (id TEXT PRIMARY KEY, created TEXT NOT NULL, checksum TEXT NOT NULL)",
)

BY_QUESTION: Final[Migration] = (
    # Used whenever recordings of a question are added, and when something is forgotten.
    "CREATE INDEX recordings_by_question ON recordings (question_id, model, benchmark)",
)

SIGNALS: Final[Migration] = (
    # A table of its own: the checksums of known branches stay valid, and branches without signals need no row.
    """CREATE TABLE branch_signals (
        recording_id TEXT NOT NULL REFERENCES recordings (id),
        number INTEGER NOT NULL,
        confidences TEXT NOT NULL,
        lowests TEXT NOT NULL,
        probe_confidences TEXT NOT NULL,
        checksum TEXT NOT NULL,
        PRIMARY KEY (recording_id, number)
    )""",
)

_SUMS: Final = """(
        measure TEXT NOT NULL,
        start TEXT NOT NULL,
        tenant TEXT NOT NULL,
        model TEXT NOT NULL,
        name TEXT NOT NULL,
        episodes BIGINT NOT NULL,
        tokens BIGINT NOT NULL,
        seconds DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (measure, start, tenant, model, name)
    ) WITHOUT ROWID"""
"""Columns of the tables of sums. Days are summed from hours."""
USAGE: Final[Migration] = (
    # These tables are derived from `episodes`, so their rows have no checksums; `discovery.store.usage` makes them.
    # They are clustered by their keys: lists read the first in the order of time, charts the others by measure.
    """CREATE TABLE episode_facts (
        created TEXT NOT NULL,
        id TEXT NOT NULL,
        tenant TEXT NOT NULL,
        model TEXT NOT NULL,
        controller TEXT NOT NULL,
        stop TEXT NOT NULL,
        beta DOUBLE PRECISION NOT NULL,
        is_fallback INTEGER NOT NULL,
        seconds DOUBLE PRECISION NOT NULL,
        latency INTEGER NOT NULL,
        tokens BIGINT NOT NULL,
        winner BIGINT NOT NULL,
        agreeing BIGINT NOT NULL,
        losing BIGINT NOT NULL,
        pruned BIGINT NOT NULL,
        probe BIGINT NOT NULL,
        finalise BIGINT NOT NULL,
        aborted BIGINT NOT NULL,
        PRIMARY KEY (created, id)
    ) WITHOUT ROWID""",
    f"CREATE TABLE usage_hours {_SUMS}",
    f"CREATE TABLE usage_days {_SUMS}",
    # The hour before which everything is summed.
    "CREATE TABLE usage_summed (until TEXT NOT NULL)",
    "INSERT INTO usage_summed (until) VALUES ('')",
)

JUDGE: Final[Migration] = ("ALTER TABLE episode_facts ADD COLUMN judge BIGINT NOT NULL DEFAULT 0",)

RETENTION: Final[Migration] = (
    # Used when old records expire, and when questions that nothing refers to are removed.
    "CREATE INDEX feedback_by_age ON feedback (created)",
    "CREATE INDEX episodes_by_question ON episodes (question_id)",
)

DERIVED: Final = (USAGE, JUDGE)
"""Migrations after which usage is made anew from the episodes."""

MIGRATIONS: Final[Sequence[Migration]] = (FIRST, SANDBOX, RUNS, LIVE, BY_QUESTION, SIGNALS, USAGE, JUDGE, RETENTION)
"""Statements that lead from each version to the next. A store's version is the number of migrations it has had."""

COLUMNS: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "questions": ("id", "split", "reference", "label_source", "body", "added"),
        "recordings": (
            *("id", "number", "question_id", "model", "benchmark", "sampling", "delta"),
            *("probe_template", "origin", "complete", "branches", "added"),
        ),
        "branches": ("recording_id", "number", "tokens", "complete", "final", "probes", "probe_tokens"),
        "episodes": (
            *("id", "request_id", "question_id", "model", "controller", "digest", "beta"),
            *("rounds", "branches", "ledger", "stop", "answer", "created", "sandbox"),
            *("tenant", "about", "trace"),
        ),
        "feedback": ("id", "request_id", "kind", "value", "created", "tenant"),
        "runs": ("id", "explorer", "seed", "settings", "candidates", "created"),
        "candidates": ("id", "run_id", "digest", "name", "explorer", "parent", "score", "failure", "usd", "source"),
        "provenance": ("recording_id", "chat_template", "request_id"),
        "branch_signals": ("recording_id", "number", "confidences", "lowests", "probe_confidences"),
        "labels": ("id", "question_id", "source", "answer", "confidence", "margin", "created"),
        "forgotten": ("id", "created"),
    }
)
"""Columns by table, in the order in which the checksum covers them."""

NUMBERS: Final = frozenset(
    {
        *("number", "delta", "complete", "branches", "tokens", "beta", "rounds"),
        *("seed", "candidates", "score", "usd", "confidence", "margin"),
    }
)
"""Columns that hold numbers; all others hold text."""


def select_statement(table: str, rest: str = "") -> str:
    """Return the statement that selects complete rows, checksum last."""
    columns = ", ".join(f"{table}.{column}" for column in (*COLUMNS[table], "checksum"))
    return f"SELECT {columns} FROM {table} {rest}"
