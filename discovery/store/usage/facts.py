"""Facts of served episodes: what lists filter by and sums are made of, in one narrow table in the order of time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from discovery.data.safe_json import parse_json
from discovery.store.records import ServedEpisode

KINDS: Final = ("winner", "agreeing", "losing", "pruned", "probe", "finalise", "judge", "aborted")
"""Purposes that tokens are spent on, as in the bill of a reply."""
FAILED_STOPS: Final = ("failed", "upstream_error", "controller_error", "disconnected", "draining")
"""Stop reasons of requests without a full answer. Those that end by `deadline` have one or not, so it is not here."""
COLUMNS: Final = (
    *("created", "id", "tenant", "model", "controller", "stop", "beta"),
    "is_fallback",  # 1 if the baseline took over, else 0
    "seconds",  # from request to reply
    "latency",  # step of the latency histogram
    "tokens",  # the sum over kinds, also of unknown ones
    *KINDS,
)
"""Columns of table `episode_facts`."""
STORED_COLUMNS: Final = "created, id, tenant, model, controller, stop, beta, about, ledger"
"""Columns of table `episodes` that `stored_facts` reads."""
BETA_STEPS: Final = 20
"""Steps of the β histogram from 0 to 1."""
LATENCY_STEPS: Final = 4
"""Steps of the latency histogram by which a duration doubles; a step is about 19 %."""
SHORTEST_S: Final = 0.001

Facts = tuple[Any, ...]
"""Row of table `episode_facts`."""


def facts_of(episode: ServedEpisode) -> Facts:
    """Return the facts of an episode."""
    about = episode.about
    identity = (episode.created, episode.id, episode.tenant, episode.model, episode.controller, episode.stop)
    return _facts((*identity, float(episode.beta)), about.get("fallback"), about.get("seconds", 0.0), episode.ledger)


def stored_facts(row: Sequence[Any]) -> Facts | None:
    """Return the facts of a stored episode, read by STORED_COLUMNS, or None if its row is corrupt."""
    *identity, beta, about_text, ledger_text = row
    try:
        about, ledger = parse_json(about_text), parse_json(ledger_text)
        if not all(isinstance(column, str) for column in identity) or not math.isfinite(beta):
            return None
        return _facts((*identity, beta), about.get("fallback"), about.get("seconds", 0.0), ledger)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None


def prompt_tokens_of(about_text: object, ledger_text: object) -> int:
    """Return the tokens of a stored episode's prompt: those of its usage that are not in its bill.

    The `prompt_tokens` of the usage are more: they include the suffixes of probes, which are in the bill too. It is 0
    without a reply, or if the row is corrupt.
    """
    try:
        total = parse_json(about_text)["usage"]["total_tokens"]  # type: ignore[arg-type]
        prompt = total - sum(parse_json(ledger_text).values())  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError, LookupError):
        return 0
    return max(0, prompt) if type(prompt) is int else 0


def _facts(identity: Facts, fallback: str | None, seconds: float, ledger: Mapping[str, int]) -> Facts:
    spent = ledger.get
    timing = (fallback is not None, seconds, latency_step(seconds))
    return (*identity, *timing, sum(ledger.values()), *[spent(kind, 0) for kind in KINDS])


def latency_step(seconds: float) -> int:
    """Return the step of the latency histogram that a duration falls into."""
    return math.floor(LATENCY_STEPS * math.log2(max(seconds, SHORTEST_S)))


def latency_bounds(step: int) -> tuple[float, float]:
    """Return the shortest and the longest duration of a step, in seconds."""
    return 2 ** (step / LATENCY_STEPS), 2 ** ((step + 1) / LATENCY_STEPS)
