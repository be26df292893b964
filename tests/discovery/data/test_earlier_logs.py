"""Logs written by earlier versions are read, verified and appended to without changing a byte of them.

`logs/` holds a run's history, a gate's ledger and a registry's audit log as version 0.1 wrote them.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.errors import GateError, HistoryError, PromotionError
from discovery.promotion.ledger import Ledger
from discovery.promotion.registry import ChangeCause, Registry
from discovery.search.history import History
from tests.discovery.promotion.outside import folder_of

LOGS = Path(__file__).parent / "logs"
NOON = datetime(2026, 11, 29, 2, tzinfo=UTC)
FIRST, SECOND = Spec("mine1", "# 1\n"), Spec("mine2", "# 2\n")
SETTINGS = {"explorer": "grammar", "seed": 3, "betas": (0.0, 0.5), "latency": None}
NOTE = "β “quoted” \u2028 \x1b \ud800"
VERDICTS = {"step": 0, "verdicts": [{"score": 71.25, "failure": ""}]}
DISTURBED = {
    "split": "ab" * 32,
    "questions": ["0123456789abcdef"],
    "digest": "c" * 64,
    "champion": "d" * 64,
    "k": 2,
    "p": 1.0,
    "verdict": "disturbed",
    "created": "2026-11-29T02:00:00+00:00",
    "who": "zoë",
    "report": {"disturbed": "it was killed"},
}


def without_last_line(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(b"".join((LOGS / name).read_bytes().splitlines(keepends=True)[:-1]))
    return path


def test_an_earlier_history_is_read() -> None:
    history = History.read(LOGS / "history.jsonl")
    assert [event.kind for event in history.events] == ["begun", "proposed", "judged"]
    assert history.events[1].body["candidates"][0]["note"] == NOTE
    assert history.events[2].body == VERDICTS
    assert history.head == "16ae2c62160273de71658867c28426a25e0a95ae465ef79dc71b8b75b43cc9fb"


def test_an_earlier_history_is_continued_with_the_same_bytes(tmp_path: Path) -> None:
    path = without_last_line("history.jsonl", tmp_path)
    History.resume(path, SETTINGS).append("judged", VERDICTS)
    assert path.read_bytes() == (LOGS / "history.jsonl").read_bytes()


def test_an_earlier_ledger_is_read() -> None:
    first, second = Ledger(LOGS / "ledger.jsonl").judgements()
    assert (first.k, first.verdict, first.who, first.report["headline"]) == (1, "reject", "zoë", "β → +0.10 points")
    assert second.model_dump(exclude={"after", "model", "sequence"}) == DISTURBED


def test_an_earlier_ledger_is_continued_with_the_same_bytes(tmp_path: Path) -> None:
    path = without_last_line("ledger.jsonl", tmp_path)
    Ledger(path).append(**DISTURBED)
    assert path.read_bytes() == (LOGS / "ledger.jsonl").read_bytes()


def earlier_registry(folder: Path) -> Registry:
    """Return the registry as it was after its second change."""
    registry = Registry(folder)
    registry.install(FIRST, {"headline": "fine"}, RolloutStage.SHADOW, 0, ChangeCause("zoë", "β", NOON))
    registry.install(SECOND, {"headline": "fine"}, RolloutStage.CANARY, 0.25, ChangeCause("me", "", NOON, forced=True))
    return registry


def test_an_earlier_audit_log_is_read(tmp_path: Path) -> None:
    for name in ("audit.jsonl", "registry.json"):
        shutil.copy(LOGS / name, tmp_path)
    registry = Registry(tmp_path)
    assert [line["action"] for line in registry.audit()] == ["install as shadow", "install as canary", "drop canary"]
    assert registry.read().default.stages == {
        RolloutStage.SHADOW: FIRST.digest,
        RolloutStage.CANARY: None,
        RolloutStage.CHAMPION: None,
    }


def test_an_earlier_audit_log_is_continued_with_the_same_bytes(tmp_path: Path) -> None:
    registry = earlier_registry(tmp_path)
    written = folder_of(registry).audit_log.path.read_bytes()
    assert written == without_last_line("audit.jsonl", tmp_path).read_bytes()
    registry.drop_canary(SECOND.digest, ChangeCause("watcher", "tokens", NOON))
    for name in ("audit.jsonl", "registry.json"):
        assert (tmp_path / name).read_bytes() == (LOGS / name).read_bytes()


def test_an_earlier_registry_is_upgraded_by_the_first_change_for_a_model(tmp_path: Path) -> None:
    registry = earlier_registry(tmp_path)
    before = registry.read()
    registry.promote(SECOND.digest, RolloutStage.CHAMPION, 0, ChangeCause("me", "", NOON), "small")
    assert json.loads(folder_of(registry).file.read_bytes())["format"] == 2
    after = registry.read()
    assert (after.default, after.own("small").champion) == (before.default, SECOND.digest)
    assert [line.get("model") for line in registry.audit()] == [None, None, "small"]


def test_a_changed_byte_of_an_earlier_log_is_found(tmp_path: Path) -> None:
    for name in ("history.jsonl", "ledger.jsonl", "audit.jsonl", "registry.json"):
        changed = (LOGS / name).read_bytes()
        if name != "registry.json":
            begin = changed.index(b"\n") - 200
            changed = changed[:begin] + bytes([changed[begin] ^ 1]) + changed[begin + 1 :]
        (tmp_path / name).write_bytes(changed)
    with pytest.raises(HistoryError):
        History.read(tmp_path / "history.jsonl")
    with pytest.raises(GateError):
        Ledger(tmp_path / "ledger.jsonl").judgements()
    with pytest.raises(PromotionError):
        Registry(tmp_path).audit()
