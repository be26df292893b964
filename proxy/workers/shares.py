"""Settings of each of several workers: limits of a process are divided, so that together they stay what was set."""

from __future__ import annotations

import secrets
from typing import Final

from pydantic import SecretStr

from proxy.settings import Settings

DIVIDED: Final = (
    *("max_episodes", "max_passed", "branches_in_flight", "feedback_per_minute", "record_tokens_per_hour"),
    *("max_connections", "max_connections_per_address", "max_bodies_bytes"),
)
"""Limits of a process of which each worker gets a part, at least 1."""
DIVIDED_TO_ZERO: Final = ("queue", "sandbox_pool", "spill_bytes")
"""Limits of a process of which each worker gets a part, which may be 0."""


def of_worker(settings: Settings) -> Settings:
    """Return the settings of one of `settings.workers` workers.

    They share one secret of the prefix cache. The dashboard is off, because its sessions are in one process. Tokens per
    minute are divided only if no Redis counts them.
    """
    count = settings.workers
    if count == 1:
        return settings
    parts: dict[str, object] = {name: max(1, getattr(settings, name) // count) for name in DIVIDED}
    parts |= {name: getattr(settings, name) // count for name in DIVIDED_TO_ZERO}
    if settings.tokens_per_minute is not None and not settings.limits:
        parts["tokens_per_minute"] = max(1, settings.tokens_per_minute // count)
    if settings.cache_secret is None:
        parts["cache_secret"] = SecretStr(secrets.token_hex(32))
    return settings.model_copy(update={**parts, "ui": False})


def note(settings: Settings) -> str:
    """Return what the log says about the limits of several workers."""
    shared = (
        "tokens per minute and the episodes of keys hold over all of them"
        if settings.limits
        else "tokens per minute and the episodes of keys are divided among them; AUTOTTS_LIMITS shares them instead"
    )
    return f"{settings.workers} workers share the port: {shared}; other limits are divided, and the dashboard is off"
