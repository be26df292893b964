"""Shares of the settings that each worker gets, and of the limits of keys."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from proxy.admission.token_budget import Caps
from proxy.settings import load
from proxy.workers.shares import DIVIDED, DIVIDED_TO_ZERO, note, of_worker


def test_one_process_keeps_its_settings() -> None:
    settings = load(workers=1)
    assert of_worker(settings) is settings


def test_together_workers_have_at_most_the_limits_of_one_process() -> None:
    settings = load(workers=3, tokens_per_minute=1000, queue=2)
    worker = of_worker(settings)
    for name in (*DIVIDED, *DIVIDED_TO_ZERO, "tokens_per_minute"):
        assert 3 * getattr(worker, name) <= getattr(settings, name)
    assert (worker.tokens_per_minute, worker.queue, worker.workers) == (333, 0, 3)
    assert not worker.ui


def test_workers_share_the_secret_of_the_prefix_cache() -> None:
    drawn = of_worker(load(workers=2)).cache_secret
    assert drawn is not None
    assert len(drawn) == 64
    given = SecretStr("mine")
    assert of_worker(load(workers=2, cache_secret=given)).cache_secret == given


def test_limits_in_redis_are_not_divided() -> None:
    settings = load(workers=2, tokens_per_minute=1000, limits=SecretStr("redis://host"))
    assert of_worker(settings).tokens_per_minute == 1000
    assert "hold over all of them" in note(settings)
    assert "divided among them" in note(load(workers=2))


@pytest.mark.parametrize(
    ("caps", "share"),
    [
        (Caps(), Caps()),
        (Caps(8, 500, 1001, 5), Caps(8, 500, 500, 2)),
        (Caps(None, None, 1, 1), Caps(None, None, 1, 1)),
    ],
)
def test_each_worker_has_its_share_of_the_limits_of_a_key(caps: Caps, share: Caps) -> None:
    assert caps.share(2) == share
