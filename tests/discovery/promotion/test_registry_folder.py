"""A registry in a folder: its files, and consistency after interrupted changes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controllers.rollout_state import RolloutStage
from discovery.errors import PromotionError
from discovery.promotion.registry import Registry
from tests.discovery.promotion.examples import CARD, ME, WRITER, spec
from tests.discovery.promotion.outside import folder_of
from tests.discovery.promotion.test_registry import consistent

KILLS = 25


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "installed")


def names(registry: Registry) -> list[str]:
    return sorted(path.name for path in folder_of(registry).folder.iterdir())


def test_the_folder_has_a_file_for_each_part(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    digest = spec(1).digest
    assert names(registry) == sorted([f"{digest}.json", f"{digest}.py", "audit.jsonl", "registry.json"])


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PromotionError, match="file"):
        Registry(tmp_path / "file").install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)


def test_a_folder_that_may_not_be_used_says_how_to_name_another(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    advice = r"Permission denied; let this user read and write the registry, or name another \(AUTOTTS_REGISTRY\)"
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PromotionError, match=advice):
        registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PromotionError, match=advice):
        registry.read()


def test_a_pipe_in_place_of_a_source_is_refused(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    path = folder_of(registry).folder / f"{spec(1).digest}.py"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PromotionError, match=r"not a regular file.*promote the controller's file again"):
        registry.spec(spec(1).digest)


def test_a_disk_failure_at_any_step_leaves_the_old_or_the_new_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, outcomes = 0, []
    for at in range(1000):
        registry = Registry(tmp_path / str(at))
        registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
        old = registry.read()
        with monkeypatch.context() as patch:
            count = _fail(patch, at)
            try:
                new, failed = registry.install(spec(2), CARD, RolloutStage.CHAMPION, 0, ME), False
            except PromotionError:
                new, failed = old.promote(spec(2).digest, RolloutStage.CHAMPION, 0), True
        state = consistent(registry)
        assert state in (old, new)
        assert failed or state == new
        outcomes.append((failed, state == new))
        assert registry.install(spec(3), CARD, RolloutStage.SHADOW, 0, ME).version == state.version + 1
        consistent(registry)
        assert not [path for path in folder_of(registry).folder.iterdir() if path.name.startswith(".")]
        steps = count[0]
        if at >= steps:
            break
    assert steps >= 8  # write and rename three files, the audit log, and sync the folder twice
    assert {(True, False), (True, True), (False, True)} == set(outcomes)


def _fail(patch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Make disk operation number `at` fail, and return a list with the number of operations so far."""
    count = [0]

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == at + 1:
                raise OSError(5, "the disk fails")
            return real(*arguments)

        return step

    for name in ("fsync", "replace", "truncate"):
        patch.setattr(os, name, failing(getattr(os, name)))
    return count


def test_a_torn_line_of_the_audit_log_is_removed_by_the_next_change(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)
    complete = folder_of(registry).audit_log.path.read_bytes()
    registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME)
    folder_of(registry).audit_log.path.write_bytes(complete + b'{"when": "2026')
    assert len(registry.audit()) == 2
    registry.install(spec(3), CARD, RolloutStage.SHADOW, 0, ME)
    assert [json.loads(line)["version"] for line in folder_of(registry).audit_log.path.read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    consistent(registry)


@pytest.mark.process
def test_a_writer_killed_at_any_time_leaves_a_consistent_registry(registry: Registry) -> None:
    registry.install(spec(8), CARD, RolloutStage.SHADOW, 0, ME)
    chance = random.Random(6)
    torn = 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", WRITER, str(registry.place), "0"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            acknowledged = int(process.stdout.readline())
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 0.02))
            process.kill()
            acknowledged = max([acknowledged, *map(int, process.stdout.read().split("\n")[:-1])])
        torn += len(folder_of(registry).audit_log.path.read_text().splitlines()) != registry.read().version
        torn += any(path.name.startswith(".") for path in folder_of(registry).folder.iterdir())
        assert consistent(registry).version >= acknowledged
    assert torn  # some kills hit a change in progress
    registry.install(spec(9), CARD, RolloutStage.SHADOW, 0, ME)
    assert not [path for path in folder_of(registry).folder.iterdir() if path.name.startswith(".")]
