"""Controllers and causes of changes for tests of registries. Processes that tests start import nothing costly here."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from controllers.loading import Spec
from discovery.promotion.registry import ChangeCause

NOON: Final = datetime(2026, 11, 24, 12, tzinfo=UTC)
ME: Final = ChangeCause("me", "a test", NOON)
FORCED: Final = ChangeCause("me", "a test", NOON, forced=True)
CARD: Final = {"headline": "fine"}
HELD_OUT_CELLS: Final = [{"model": "m", "benchmark": "b", "split": "held-out"}]
"""Cells of a report of the gate."""


def spec(number: int) -> Spec:
    """Return a controller from a file, one for each number."""
    return Spec(f"mine{number}", f"# {number}\n")


BEGIN: Final = """
import sys
from dataclasses import replace
from contextlib import suppress
from controllers.rollout_state import RolloutStage
from discovery.errors import PromotionError
from discovery.promotion.registry import Registry
from discovery.store import parse_place
from tests.discovery.promotion.examples import CARD, HELD_OUT_CELLS, ME, spec
registry, writer = Registry(parse_place(sys.argv[1])), int(sys.argv[2])
print(0, flush=True)
sys.stdin.read()
"""
"""Beginning of a program that changes a registry once its standard input is closed."""
WRITER: Final = f"""{BEGIN}
for number in range(10**6):
    changed, stage = spec(10 * writer + number % 7), (RolloutStage.SHADOW, RolloutStage.CANARY)[number % 2]
    after = registry.install(changed, CARD, stage, 0.5, ME)
    print(after.version, flush=True)
"""
"""Program that changes a registry again and again, and prints each version."""
