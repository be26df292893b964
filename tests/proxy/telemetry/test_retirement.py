"""Retirement: keys that are not in use are found after a while, and their label sets are removed."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.telemetry import retirement
from proxy.telemetry.label_sets import LabelSets
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.retirement import Retirement, RetirementTask


class Clock:
    """Clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _unused_key() -> tuple[Clock, Retirement]:
    """Return a clock, and keys of which `a` has just been found unused."""
    clock = Clock()
    keys = Retirement(600, clock)
    assert keys.retired(["a"], set()) == []
    return clock, keys


def test_a_key_is_retired_once_it_has_not_been_in_use_for_the_whole_time() -> None:
    clock = Clock()
    keys = Retirement(600, clock)
    assert keys.retired(["old", "new"], {"new"}) == []
    clock.now += 599
    assert keys.retired(["old", "new"], {"new"}) == []
    clock.now += 1
    assert keys.retired(["old", "new"], {"new"}) == ["old"]
    assert keys.retired(["new"], {"new"}) == []


def test_the_time_begins_anew_for_a_key_that_was_in_use_again() -> None:
    clock, keys = _unused_key()
    clock.now += 599
    assert keys.retired(["a"], {"a"}) == []
    clock.now += 1
    assert keys.retired(["a"], set()) == []
    clock.now += 600
    assert keys.retired(["a"], set()) == ["a"]
    assert keys.retired(["a"], set()) == []  # it appeared again
    clock.now += 600
    assert keys.retired(["a"], set()) == ["a"]


def test_a_key_that_is_held_is_not_retired() -> None:
    clock, keys = _unused_key()
    with keys.hold("a"):
        with keys.hold("a"):
            clock.now += 1000
            assert keys.retired(["a"], set()) == []
        clock.now += 1000
        assert keys.retired(["a"], set()) == []
    clock.now += 599
    assert keys.retired(["a"], set()) == []
    clock.now += 600
    assert keys.retired(["a"], set()) == ["a"]


def test_the_time_after_a_hold_begins_anew_even_if_nobody_looked_meanwhile() -> None:
    clock, keys = _unused_key()
    clock.now += 599
    with keys.hold("a"):
        pass
    clock.now += 1
    assert keys.retired(["a"], set()) == []


def test_nothing_is_remembered_of_keys_that_are_gone() -> None:
    keys = Retirement(600, Clock())
    for number in range(1000):
        keys.retired([f"key {number}"], set())
        with keys.hold(f"held {number}"):
            pass
    assert len(keys._unused_since) == 1
    assert not keys._held


def test_all_label_sets_of_a_value_are_removed_and_no_others() -> None:
    metrics = Metrics()
    for controller in ("old", "new"):
        metrics.requests.labels("m", controller, "answered").inc()
        metrics.child(metrics.requests, "m", controller, "failed").inc()
        metrics.tokens.labels("m", controller, "0.5", "winner").inc(7)
        metrics.decision_seconds.labels(controller).observe(0.1)
    sets = LabelSets(metrics, "controller")
    assert sets.values() == {"old", "new"}
    before = metrics.exposition().decode()
    sets.remove([])
    assert metrics.exposition().decode() == before
    sets.remove({"old", "never counted"})
    assert sets.values() == {"new"}
    kept = [line for line in before.splitlines() if 'controller="old"' not in line]
    assert metrics.exposition().decode().splitlines() == kept
    assert len(metrics.children) == 1


def test_what_is_counted_after_a_removal_is_exported() -> None:
    metrics = Metrics()
    metrics.child(metrics.requests, "m", "old", "answered").inc(5)
    LabelSets(metrics, "controller").remove({"old"})
    metrics.child(metrics.requests, "m", "old", "answered").inc(2)
    families = text_string_to_metric_families(metrics.exposition().decode())
    values = [
        sample.value for family in families for sample in family.samples if sample.name == "autotts_requests_total"
    ]
    assert values == [2]


async def test_the_task_looks_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retirement, "LEAST_WAIT_S", 0.0)
    looks: asyncio.Queue[None] = asyncio.Queue()
    task = RetirementTask(0.001, lambda: looks.put_nowait(None))
    task.open()
    await looks.get()
    await looks.get()
    await task.close()


async def test_a_removal_that_fails_is_logged_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retirement, "LEAST_WAIT_S", 0.0)
    looks: asyncio.Queue[None] = asyncio.Queue()

    def fail() -> None:
        raise ValueError("faulty")

    task = RetirementTask(0.001, fail, lambda: looks.put_nowait(None))
    task.open()
    await looks.get()
    await looks.get()
    await task.close()
    assert "cannot remove what serves no longer" in caplog.text
    assert "ValueError: faulty" in caplog.text
