"""The registry: moves between stages, its files, and consistency after interrupted changes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage, RolloutState, lot, name_problem
from discovery.commands.promote import card_of, install
from discovery.errors import PromotionError
from discovery.promotion.registry import ChangeCause, Registry

A, B, C = (letter * 64 for letter in "abc")
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
ME = ChangeCause("me", "a test", NOON)
FORCED = ChangeCause("me", "a test", NOON, forced=True)
CARD = {"headline": "fine"}
KILLS = 25


def spec(number: int) -> Spec:
    return Spec(f"mine{number}", f"# {number}\n")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "installed")


# Moves between stages


def test_a_controller_moves_through_the_stages_and_back() -> None:
    shadow = RolloutState().promote(A, RolloutStage.SHADOW, 0)
    assert (shadow.shadow, shadow.version) == (A, 1)
    canary = shadow.promote(A, RolloutStage.CANARY, 0.25)
    assert (canary.shadow, canary.canary, canary.share) == (None, A, 0.25)
    champion = canary.promote(A, RolloutStage.CHAMPION, 0)
    assert (champion.canary, champion.share, champion.champion, champion.previous) == (None, 0.0, A, (None,))
    second = (
        champion.promote(B, RolloutStage.CANARY, 0.5)
        .promote(B, RolloutStage.CHAMPION, 0)
        .promote(C, RolloutStage.CANARY, 1)
    )
    assert (second.champion, second.previous, second.stage_of(C)) == (B, (None, A), RolloutStage.CANARY)
    back = second.roll_back()
    assert (back.champion, back.canary, back.previous, back.version) == (A, None, (None,), second.version + 1)
    assert back.roll_back().champion is None


def test_a_stage_holds_one_controller_and_a_controller_one_stage() -> None:
    both = (
        RolloutState()
        .promote(A, RolloutStage.SHADOW, 0)
        .promote(B, RolloutStage.SHADOW, 0)
        .promote(A, RolloutStage.CANARY, 0.1)
    )
    assert both.stages == {RolloutStage.SHADOW: B, RolloutStage.CANARY: A, RolloutStage.CHAMPION: None}
    swapped = both.promote(B, RolloutStage.CANARY, 0.2)
    assert swapped.stages == {RolloutStage.SHADOW: None, RolloutStage.CANARY: B, RolloutStage.CHAMPION: None}


def test_a_rollback_without_a_champion_drops_only_the_canary() -> None:
    installed = RolloutState().promote(A, RolloutStage.SHADOW, 0).promote(B, RolloutStage.CANARY, 0.1).roll_back()
    assert installed.stages == {RolloutStage.SHADOW: A, RolloutStage.CANARY: None, RolloutStage.CHAMPION: None}


def test_a_rollback_skips_quarantined_controllers_and_may_take_one_from_the_shadow_stage() -> None:
    three = (
        RolloutState()
        .promote(A, RolloutStage.CHAMPION, 0)
        .promote(B, RolloutStage.CHAMPION, 0)
        .promote(C, RolloutStage.CHAMPION, 0)
    )
    assert three.quarantine(B).roll_back().champion == A
    back = three.promote(B, RolloutStage.SHADOW, 0).roll_back()
    assert (back.champion, back.shadow) == (B, None)


def test_a_quarantined_controller_loses_its_stage_unless_it_is_the_champion() -> None:
    installed = RolloutState().promote(A, RolloutStage.CANARY, 0.5).promote(B, RolloutStage.CHAMPION, 0)
    assert installed.quarantine(A).canary is None
    assert installed.quarantine(B).champion == B
    lifted = installed.quarantine(A).promote(A, RolloutStage.CANARY, 0.5, forced=True)
    assert (lifted.canary, lifted.quarantined) == (A, frozenset())


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda installed: installed.promote(A, RolloutStage.SHADOW, 0), "aaaaaaaaaaaa is the champion"),
        (lambda installed: installed.promote(C, RolloutStage.CANARY, 0.1), "is quarantined because it failed; --force"),
        (lambda installed: installed.promote(B, RolloutStage.CANARY, 1.5), "share is a number from 0 to 1"),
        (lambda installed: installed.drop_canary(B), "is not the canary"),
        (lambda installed: installed.quarantine(C), "quarantined already"),
        (lambda _: RolloutState().roll_back(), "neither a canary nor a champion"),
    ],
)
def test_an_impossible_move_is_refused_with_the_reason(
    move: Callable[[RolloutState], RolloutState], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        move(RolloutState(champion=A, quarantined=frozenset({C})))


def test_a_rollout_state_survives_a_round_trip_through_json() -> None:
    installed = RolloutState(7, A, B, 0.5, C, (None, A), frozenset({"d" * 64}))
    assert RolloutState.parse(json.loads(json.dumps(installed.as_json()))) == installed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("version", -1),
        ("version", True),
        ("shadow", "abc"),
        ("champion", 7),
        ("canary", "x"),
        ("canary", {"digest": None, "share": 0.5}),
        ("canary", {"digest": A, "share": 2}),
        ("canary", {"digest": A, "share": True}),
        ("canary", {"digest": C, "share": 0.1}),
        ("previous", None),
        ("previous", ["../x"]),
        ("quarantined", [None]),
    ],
)
def test_an_invalid_rollout_state_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        RolloutState.parse({**RolloutState(champion=C).as_json(), field: value})


def test_the_lot_of_a_request_is_deterministic_and_uniform() -> None:
    lots = [lot(f"chatcmpl-{number}") for number in range(2000)]
    assert lot("chatcmpl-0") == lots[0]
    assert all(0 <= one < 1 for one in lots)
    assert 0.27 < sum(one < 0.3 for one in lots) / 2000 < 0.33


def test_invalid_controller_names_are_refused_with_the_reason() -> None:
    assert name_problem("mine_2") is None
    assert "built-in" in str(name_problem("cmc"))
    assert "letters" in str(name_problem("../x"))


# The registry folder


def test_an_installed_controller_is_read_back_from_the_folder(registry: Registry) -> None:
    assert (registry.read(), registry.stamp(), registry.audit()) == (RolloutState(), None, [])
    after = registry.install(spec(1), CARD, RolloutStage.CANARY, 0.25, ME)
    stamp = registry.stamp()
    assert Registry(registry.folder).read() == after
    assert registry.spec(spec(1).digest) == spec(1)
    assert registry.card(spec(1).digest) == {
        **CARD,
        "name": "mine1",
        "digest": spec(1).digest,
        "forced": False,
    }
    registry.promote(registry.find(spec(1).digest[:8]), RolloutStage.CHAMPION, 0, ME)
    assert registry.stamp() != stamp
    assert registry.roll_back(ME).champion is None


def test_the_audit_log_records_who_when_action_and_stage_changes(registry: Registry) -> None:
    first, second = spec(1).digest, spec(2).digest
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.install(spec(2), CARD, RolloutStage.CHAMPION, 0, FORCED)
    registry.promote(first, RolloutStage.CANARY, 0.5, ME)
    registry.drop_canary(first, ChangeCause("watcher", "tokens", NOON))
    audit = registry.audit()
    assert [(line["who"], line["action"], line["forced"], line["version"]) for line in audit] == [
        ("me", "install as champion", False, 1),
        ("me", "install as champion", True, 2),
        ("me", "promote to canary", False, 3),
        ("watcher", "drop canary", False, 4),
    ]
    assert [(line["before"], line["after"]) for line in audit[1:]] == [
        ({"champion": first}, {"champion": second}),
        ({"canary": None}, {"canary": first}),
        ({"canary": first}, {"canary": None}),
    ]
    assert audit[0]["when"] == "2026-11-24T12:00:00+00:00"
    assert registry.card(second)["forced"] is True


def test_a_changed_line_of_the_audit_log_is_refused(registry: Registry) -> None:
    for number in range(3):
        registry.install(spec(number), CARD, RolloutStage.SHADOW, 0, ME)
    content = registry.audit_path.read_text()
    for changed in (
        content.replace('"me"', '"us"', 1),
        content.split("\n", 2)[0] + "\n" + content.split("\n", 2)[2],
        "x\n",
    ):
        registry.audit_path.write_text(changed)
        with pytest.raises(PromotionError, match=r"audit\.jsonl: .*restore it from a copy, or move it away"):
            registry.audit()
    registry.audit_path.unlink()  # the remedy the message names
    registry.install(spec(9), CARD, RolloutStage.SHADOW, 0, ME)
    assert [line["version"] for line in registry.audit()] == [3, 4]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\xff"])
def test_a_corrupt_registry_file_is_refused_with_a_remedy_that_works(registry: Registry, text: str) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.file.write_bytes(text.encode("latin-1"))
    for attempt in (registry.read, registry.audit, lambda: registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME)):
        with pytest.raises(PromotionError, match=r"registry\.json: .*move it away and promote again"):
            attempt()
    registry.file.unlink()
    assert registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME).shadow == spec(2).digest
    assert len(registry.audit()) == 2


def test_a_controller_file_changed_after_its_installation_is_refused(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.install(spec(2), CARD, RolloutStage.CHAMPION, 0, ME)
    path = registry.folder / f"{spec(1).digest}.py"
    path.write_text("# 3\n")
    before = registry.read()
    for attempt in (lambda: registry.spec(spec(1).digest), lambda: registry.roll_back(ME)):
        with pytest.raises(PromotionError, match=rf"{path.name}: the content .*promote the controller's file again"):
            attempt()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PromotionError, match=r"not a regular file.*promote the controller's file again"):
        registry.spec(spec(1).digest)
    path.unlink()
    assert registry.read() == before
    registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)  # the remedy the message names
    assert registry.spec(spec(1).digest) == spec(1)


def test_an_invalid_card_is_refused(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    path = registry.folder / f"{spec(1).digest}.json"
    for text in ("", "[]", '{"name": "cmc"}'):
        path.write_text(text)
        with pytest.raises(PromotionError, match=path.name):
            registry.spec(spec(1).digest)


@pytest.mark.parametrize("prefix", ["", "ab", "ffff", "zz"])
def test_a_digest_prefix_with_no_or_several_matches_is_refused(registry: Registry, prefix: str) -> None:
    registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)
    with pytest.raises(PromotionError, match=r"matches . digests"):
        registry.find(prefix)


def test_built_in_controllers_invalid_names_and_unwritable_folders_are_refused(
    registry: Registry, tmp_path: Path
) -> None:
    for wrong, message in (
        (Spec("cmc"), "is built in"),
        (Spec("cmc", "# x"), "built-in"),
        (Spec("a b", "#"), "name the"),
    ):
        with pytest.raises(PromotionError, match=message):
            registry.install(wrong, CARD, RolloutStage.SHADOW, 0, ME)
    assert not registry.folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(PromotionError, match="file"):
        Registry(tmp_path / "file").install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)


# Interrupted changes


def consistent(registry: Registry) -> RolloutState:
    """Return the rollout state after checking that its files are readable and its audit log is complete."""
    installed = registry.read()
    for holder in installed.stages.values():
        assert holder is None or registry.spec(holder).digest == holder
    audit = registry.audit()
    assert [line["version"] for line in audit] == list(range(1, installed.version + 1))
    return installed


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
        assert not [path for path in registry.folder.iterdir() if path.name.startswith(".")]
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
    complete = registry.audit_path.read_bytes()
    registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME)
    registry.audit_path.write_bytes(complete + b'{"when": "2026')
    assert len(registry.audit()) == 2
    registry.install(spec(3), CARD, RolloutStage.SHADOW, 0, ME)
    assert [json.loads(line)["version"] for line in registry.audit_path.read_text().splitlines()] == [1, 2, 3]
    consistent(registry)


WRITER = """
import sys
from pathlib import Path
from tests.discovery.promotion.test_registry import CARD, ME, Registry, RolloutStage, spec
registry = Registry(Path(sys.argv[1]))
print(0, flush=True)
sys.stdin.read()
for number in range(10**6):
    after = registry.install(spec(number % 7), CARD, (RolloutStage.SHADOW, RolloutStage.CANARY)[number % 2], 0.5, ME)
    print(after.version, flush=True)
"""


@pytest.mark.process
def test_a_writer_killed_at_any_time_leaves_a_consistent_registry(registry: Registry) -> None:
    registry.install(spec(8), CARD, RolloutStage.SHADOW, 0, ME)
    chance = random.Random(6)
    torn = 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", WRITER, str(registry.folder)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            acknowledged = int(process.stdout.readline())
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 0.02))
            process.kill()
            acknowledged = max([acknowledged, *map(int, process.stdout.read().split("\n")[:-1])])
        torn += len(registry.audit_path.read_text().splitlines()) != registry.read().version
        torn += any(path.name.startswith(".") for path in registry.folder.iterdir())
        assert consistent(registry).version >= acknowledged
    assert torn  # some kills hit a change in progress
    registry.install(spec(9), CARD, RolloutStage.SHADOW, 0, ME)
    assert not [path for path in registry.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.process
def test_concurrent_writers_are_serialized(registry: Registry) -> None:
    command = [sys.executable, "-c", WRITER.replace("10**6", "20"), str(registry.folder)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "0\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
        writer.stdin = None
    outputs = [writer.communicate()[0] for writer in writers]
    assert sorted(int(line) for one in outputs for line in one.split()) == list(range(1, 61))
    assert consistent(registry).version == 60


# Requirements of a promotion


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (None, "needs a passed gate"),
        ({"digest": A, "verdict": "promote"}, "the report is about aaaaaaaaaaaa"),
        ({"digest": spec(1).digest, "verdict": "reject"}, "verdict is 'reject'"),
        ({"digest": spec(1).digest, "verdict": "undecided"}, "verdict is 'undecided'"),
        ({"digest": spec(1).digest}, "verdict is None"),
    ],
)
def test_without_a_passed_gate_only_a_forced_installation_succeeds(
    registry: Registry, tmp_path: Path, report: dict[str, Any] | None, message: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    card = card_of(spec(1), None if report is None else path)
    with pytest.raises(PromotionError, match=message):
        install(registry, spec(1), card, RolloutStage.SHADOW, 0, ME)
    assert registry.read() == RolloutState()
    install(registry, spec(1), card, RolloutStage.SHADOW, 0, FORCED)
    assert registry.card(spec(1).digest)["forced"] is True
    assert registry.audit()[-1]["forced"] is True


def test_a_passed_gate_report_is_stored_on_the_card(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"digest": spec(1).digest, "verdict": "promote", "headline": "better by 2"}))
    install(registry, spec(1), card_of(spec(1), path), RolloutStage.CANARY, 0.1, ME)
    card = registry.card(spec(1).digest)
    assert (card["headline"], card["report"]["verdict"], card["forced"]) == ("better by 2", "promote", False)


@pytest.mark.parametrize("text", ["", "[]", "7"])
def test_an_invalid_gate_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(PromotionError, match=r"report\.json"):
        card_of(spec(1), path)
