"""The registry: its moves, its files, and what is left of it when a change is cut short anywhere."""

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


# The moves


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


def test_a_stage_has_one_holder_and_a_controller_one_stage() -> None:
    both = (
        RolloutState()
        .promote(A, RolloutStage.SHADOW, 0)
        .promote(B, RolloutStage.SHADOW, 0)
        .promote(A, RolloutStage.CANARY, 0.1)
    )
    assert both.stages == {RolloutStage.SHADOW: B, RolloutStage.CANARY: A, RolloutStage.CHAMPION: None}
    swapped = both.promote(B, RolloutStage.CANARY, 0.2)
    assert swapped.stages == {RolloutStage.SHADOW: None, RolloutStage.CANARY: B, RolloutStage.CHAMPION: None}


def test_a_rollback_without_a_champion_drops_the_canary_alone() -> None:
    installed = RolloutState().promote(A, RolloutStage.SHADOW, 0).promote(B, RolloutStage.CANARY, 0.1).roll_back()
    assert installed.stages == {RolloutStage.SHADOW: A, RolloutStage.CANARY: None, RolloutStage.CHAMPION: None}


def test_a_rollback_passes_over_the_quarantined_and_takes_its_champion_from_the_shadows() -> None:
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
    ("move", "words"),
    [
        (lambda installed: installed.promote(A, RolloutStage.SHADOW, 0), "aaaaaaaaaaaa is the champion"),
        (lambda installed: installed.promote(C, RolloutStage.CANARY, 0.1), "is quarantined because it failed; --force"),
        (lambda installed: installed.promote(B, RolloutStage.CANARY, 1.5), "share is a number from 0 to 1"),
        (lambda installed: installed.drop_canary(B), "is not the canary"),
        (lambda installed: installed.quarantine(C), "quarantined already"),
        (lambda _: RolloutState().roll_back(), "neither a canary nor a champion"),
    ],
)
def test_moves_that_are_not_possible(move: Callable[[RolloutState], RolloutState], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        move(RolloutState(champion=A, quarantined=frozenset({C})))


def test_a_registry_is_read_as_it_was_written() -> None:
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
def test_what_is_no_registry(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        RolloutState.parse({**RolloutState(champion=C).as_json(), field: value})


def test_a_request_draws_the_same_lot_everywhere() -> None:
    lots = [lot(f"chatcmpl-{number}") for number in range(2000)]
    assert lot("chatcmpl-0") == lots[0]
    assert all(0 <= one < 1 for one in lots)
    assert 0.27 < sum(one < 0.3 for one in lots) / 2000 < 0.33


def test_names() -> None:
    assert name_problem("mine_2") is None
    assert "built-in" in str(name_problem("cmc"))
    assert "letters" in str(name_problem("../x"))


# The folder


def test_what_is_installed_is_read_again(registry: Registry) -> None:
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


def test_the_audit_says_who_when_why_and_what(registry: Registry) -> None:
    one, two = spec(1).digest, spec(2).digest
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.install(spec(2), CARD, RolloutStage.CHAMPION, 0, FORCED)
    registry.promote(one, RolloutStage.CANARY, 0.5, ME)
    registry.drop_canary(one, ChangeCause("watcher", "tokens", NOON))
    audit = registry.audit()
    assert [(line["who"], line["action"], line["forced"], line["version"]) for line in audit] == [
        ("me", "install as champion", False, 1),
        ("me", "install as champion", True, 2),
        ("me", "promote to canary", False, 3),
        ("watcher", "drop canary", False, 4),
    ]
    assert [(line["before"], line["after"]) for line in audit[1:]] == [
        ({"champion": one}, {"champion": two}),
        ({"canary": None}, {"canary": one}),
        ({"canary": one}, {"canary": None}),
    ]
    assert audit[0]["when"] == "2026-11-24T12:00:00+00:00"
    assert registry.card(two)["forced"] is True


def test_a_line_that_was_changed_is_found(registry: Registry) -> None:
    for number in range(3):
        registry.install(spec(number), CARD, RolloutStage.SHADOW, 0, ME)
    told = registry.audit_path.read_text()
    for changed in (told.replace('"me"', '"us"', 1), told.split("\n", 2)[0] + "\n" + told.split("\n", 2)[2], "x\n"):
        registry.audit_path.write_text(changed)
        with pytest.raises(PromotionError, match=r"audit\.jsonl: .*restore it from a copy, or move it away"):
            registry.audit()
    registry.audit_path.unlink()  # the way out
    registry.install(spec(9), CARD, RolloutStage.SHADOW, 0, ME)
    assert [line["version"] for line in registry.audit()] == [3, 4]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\xff"])
def test_a_registry_that_is_none_is_named_and_so_is_the_way_out(registry: Registry, text: str) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.file.write_bytes(text.encode("latin-1"))
    for attempt in (registry.read, registry.audit, lambda: registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME)):
        with pytest.raises(PromotionError, match=r"registry\.json: .*move it away and promote again"):
            attempt()
    registry.file.unlink()
    assert registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME).shadow == spec(2).digest
    assert len(registry.audit()) == 2


def test_a_controller_that_is_not_what_was_installed(registry: Registry) -> None:
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
    registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)  # the way out
    assert registry.spec(spec(1).digest) == spec(1)


def test_a_card_that_is_none(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    path = registry.folder / f"{spec(1).digest}.json"
    for text in ("", "[]", '{"name": "cmc"}'):
        path.write_text(text)
        with pytest.raises(PromotionError, match=path.name):
            registry.spec(spec(1).digest)


@pytest.mark.parametrize("prefix", ["", "ab", "ffff", "zz"])
def test_a_prefix_that_stands_for_nobody_or_for_several(registry: Registry, prefix: str) -> None:
    registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)
    with pytest.raises(PromotionError, match=r"matches . digests"):
        registry.find(prefix)


def test_what_cannot_be_installed(registry: Registry, tmp_path: Path) -> None:
    for wrong, words in (
        (Spec("cmc"), "is built in"),
        (Spec("cmc", "# x"), "built-in"),
        (Spec("a b", "#"), "name the"),
    ):
        with pytest.raises(PromotionError, match=words):
            registry.install(wrong, CARD, RolloutStage.SHADOW, 0, ME)
    assert not registry.folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(PromotionError, match="file"):
        Registry(tmp_path / "file").install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)


# Cut short


def consistent(registry: Registry) -> RolloutState:
    """What is installed, all of it readable and the audit up to it."""
    installed = registry.read()
    for holder in installed.stages.values():
        assert holder is None or registry.spec(holder).digest == holder
    audit = registry.audit()
    assert [line["version"] for line in audit] == list(range(1, installed.version + 1))
    return installed


def test_a_failure_at_any_step_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        found = consistent(registry)
        assert found in (old, new)
        assert failed or found == new
        outcomes.append((failed, found == new))
        assert registry.install(spec(3), CARD, RolloutStage.SHADOW, 0, ME).version == found.version + 1
        consistent(registry)
        assert not [path for path in registry.folder.iterdir() if path.name.startswith(".")]
        steps = count[0]
        if at >= steps:
            break
    assert steps >= 8  # writing and naming three files, the audit, and the folder twice
    assert {(True, False), (True, True), (False, True)} == set(outcomes)


def _fail(patch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Have step `at` of all that reaches the disk fail; how many steps there were is counted."""
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


def test_half_a_line_of_the_audit_is_taken_back(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)
    whole = registry.audit_path.read_bytes()
    registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME)
    registry.audit_path.write_bytes(whole + b'{"when": "2026')
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
def test_a_writer_killed_anywhere_leaves_a_registry_that_can_be_read(registry: Registry) -> None:
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
    assert torn  # some of them did hit it at work
    registry.install(spec(9), CARD, RolloutStage.SHADOW, 0, ME)
    assert not [path for path in registry.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.process
def test_writers_at_once_take_turns(registry: Registry) -> None:
    command = [sys.executable, "-c", WRITER.replace("10**6", "20"), str(registry.folder)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "0\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
        writer.stdin = None
    said = [writer.communicate()[0] for writer in writers]
    assert sorted(int(line) for one in said for line in one.split()) == list(range(1, 61))
    assert consistent(registry).version == 60


# What a promotion needs


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (None, "needs a passed gate"),
        ({"digest": A, "verdict": "promote"}, "the report is about aaaaaaaaaaaa"),
        ({"digest": spec(1).digest, "verdict": "reject"}, "verdict is 'reject'"),
        ({"digest": spec(1).digest, "verdict": "undecided"}, "verdict is 'undecided'"),
        ({"digest": spec(1).digest}, "verdict is None"),
    ],
)
def test_without_a_passed_gate_only_force_installs(
    registry: Registry, tmp_path: Path, report: dict[str, Any] | None, words: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    card = card_of(spec(1), None if report is None else path)
    with pytest.raises(PromotionError, match=words):
        install(registry, spec(1), card, RolloutStage.SHADOW, 0, ME)
    assert registry.read() == RolloutState()
    install(registry, spec(1), card, RolloutStage.SHADOW, 0, FORCED)
    assert registry.card(spec(1).digest)["forced"] is True
    assert registry.audit()[-1]["forced"] is True


def test_with_one_it_is_on_the_card(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"digest": spec(1).digest, "verdict": "promote", "headline": "better by 2"}))
    install(registry, spec(1), card_of(spec(1), path), RolloutStage.CANARY, 0.1, ME)
    card = registry.card(spec(1).digest)
    assert (card["headline"], card["report"]["verdict"], card["forced"]) == ("better by 2", "promote", False)


@pytest.mark.parametrize("text", ["", "[]", "7"])
def test_a_report_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(PromotionError, match=r"report\.json"):
        card_of(spec(1), path)
