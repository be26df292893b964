"""The contract of registries, in a folder and in PostgreSQL: their rules, and concurrent changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage, RolloutState
from discovery.commands.promote import card_of, install, promote_known
from discovery.errors import PromotionError, RegistryAway
from discovery.promotion.registry import ChangeCause, Registry
from discovery.promotion.requirements import check_models
from discovery.store import DatabaseUrl
from tests.discovery.promotion.concurrent_programs import run_together
from tests.discovery.promotion.examples import BEGIN, CARD, FORCED, HELD_OUT_CELLS, ME, NOON, WRITER, spec
from tests.discovery.promotion.outside import write_audit, write_card, write_source, write_state

# Changes


def test_a_change_for_another_version_is_refused_and_changes_nothing(registry: Registry) -> None:
    before = registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    for version in (before.version - 1, before.version + 1):
        with pytest.raises(PromotionError, match=f"changed meanwhile, to version {before.version}"):
            registry.roll_back(replace(ME, version=version))
    assert (registry.read(), len(registry.audit())) == (before, 1)
    assert registry.roll_back(replace(ME, version=before.version)).default.champion is None


def test_an_installed_controller_is_read_back(registry: Registry) -> None:
    assert (registry.read(), registry.stamp(), registry.audit()) == (RolloutState(), None, [])
    after = registry.install(spec(1), CARD, RolloutStage.CANARY, 0.25, ME)
    stamp = registry.stamp()
    assert Registry(registry.place).read() == after
    assert registry.spec(spec(1).digest) == spec(1)
    assert registry.card(spec(1).digest) == {
        **CARD,
        "name": "mine1",
        "digest": spec(1).digest,
        "forced": False,
    }
    registry.promote(registry.find(spec(1).digest[:8]), RolloutStage.CHAMPION, 0, ME)
    assert registry.stamp() != stamp
    assert registry.roll_back(ME).default.champion is None


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
    lines = registry.storage.audit_lines()
    for changed in ([lines[0].replace(b'"me"', b'"us"', 1), *lines[1:]], [lines[0], lines[2]], [b"x"]):
        write_audit(registry, changed)
        with pytest.raises(PromotionError, match=r"audit.*; restore .*, or (move|delete) .* to begin a new"):
            registry.audit()
    write_audit(registry, [])  # the remedy the message names
    registry.install(spec(9), CARD, RolloutStage.SHADOW, 0, ME)
    assert [line["version"] for line in registry.audit()] == [3, 4]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\xff"])
def test_a_corrupt_state_is_refused_with_a_remedy_that_works(registry: Registry, text: str) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    write_state(registry, text.encode("latin-1"))
    for attempt in (registry.read, registry.audit, lambda: registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME)):
        with pytest.raises(PromotionError, match=r"registry.*: .*; restore .* and promote again"):
            attempt()
    write_state(registry, None)
    assert registry.install(spec(2), CARD, RolloutStage.SHADOW, 0, ME).default.shadow == spec(2).digest
    assert len(registry.audit()) == 2


def test_a_source_changed_after_its_installation_is_refused(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.install(spec(2), CARD, RolloutStage.CHAMPION, 0, ME)
    write_source(registry, spec(1).digest, b"# 3\n")
    before, wrong = registry.read(), rf"{spec(1).digest[:12]}.*: the content .*promote the controller's file again"
    for attempt in (lambda: registry.spec(spec(1).digest), lambda: registry.roll_back(ME)):
        with pytest.raises(PromotionError, match=wrong):
            attempt()
    for unreadable in (b"\xff", None):
        write_source(registry, spec(1).digest, unreadable)
        with pytest.raises(PromotionError, match=r".*: .*promote the controller's file again"):
            registry.spec(spec(1).digest)
    assert registry.read() == before
    registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)  # the remedy the message names
    assert registry.spec(spec(1).digest) == spec(1)


def test_an_invalid_card_is_refused(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    for text in ("", "[]", '{"name": "cmc"}'):
        write_card(registry, spec(1).digest, text.encode())
        with pytest.raises(PromotionError, match=rf"{spec(1).digest[:12]}.*: .*promote the controller's file again"):
            registry.spec(spec(1).digest)
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)  # the remedy the message names
    assert registry.spec(spec(1).digest) == spec(1)


def test_a_database_that_is_away_is_not_taken_for_a_missing_controller() -> None:
    away = Registry(DatabaseUrl("postgresql://nobody@127.0.0.1:1/none"))
    for attempt in (away.card, away.spec, away.find):
        with pytest.raises(RegistryAway, match="cannot reach the server") as refused:
            attempt("a" * 64)
        assert "promote the controller's file" not in str(refused.value)


@pytest.mark.parametrize("prefix", ["", "ab", "ffff", "zz"])
def test_a_digest_prefix_with_no_or_several_matches_is_refused(registry: Registry, prefix: str) -> None:
    registry.install(spec(1), CARD, RolloutStage.SHADOW, 0, ME)
    with pytest.raises(PromotionError, match=r"matches . digests"):
        registry.find(prefix)


def test_unknown_and_invalid_names_are_refused(registry: Registry) -> None:
    for wrong, message in (
        (Spec("cmd"), "there is no controller 'cmd'"),
        (Spec("cmc@3"), "takes no number of chains"),
        (Spec("everything"), "for admins only"),
        (Spec("cmc", "# x"), "built-in"),
        (Spec("a b", "#"), "name the"),
    ):
        with pytest.raises(PromotionError, match=message):
            registry.install(wrong, CARD, RolloutStage.SHADOW, 0, ME)
    assert (registry.stamp(), registry.digests()) == (None, [])


# The same change twice


def test_a_promotion_to_the_stage_that_a_controller_has_changes_nothing(registry: Registry) -> None:
    for stage, share in ((RolloutStage.SHADOW, 0), (RolloutStage.CANARY, 0.5), (RolloutStage.CHAMPION, 0)):
        first = registry.install(spec(1), CARD, stage, share, ME)
        stamp = registry.stamp()
        assert registry.install(spec(1), CARD, stage, share, replace(ME, why="again")) == first
        assert registry.promote(spec(1).digest, stage, share, ME) == first
        assert registry.stamp() == stamp
    assert len(registry.audit()) == 3


def test_a_promotion_that_changes_a_share_or_a_card_is_made(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CANARY, 0.5, ME)
    assert registry.promote(spec(1).digest, RolloutStage.CANARY, 0.25, ME).default.share == 0.25
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    after = registry.install(spec(1), {"headline": "better"}, RolloutStage.CHAMPION, 0, ME)
    assert (after.version, after.default.previous) == (4, (None,))
    assert registry.card(spec(1).digest)["headline"] == "better"
    assert registry.promote(spec(1).digest, RolloutStage.CHAMPION, 0, FORCED).version == 5
    assert registry.card(spec(1).digest)["forced"] is True
    consistent(registry)


def test_a_second_quarantine_changes_nothing(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    first = registry.quarantine(spec(1).digest, ME)
    assert registry.quarantine(spec(1).digest, ME) == first
    with pytest.raises(PromotionError, match="quarantined"):
        registry.promote(spec(1).digest, RolloutStage.CHAMPION, 0, ME)
    assert registry.promote(spec(1).digest, RolloutStage.CHAMPION, 0, FORCED).quarantined == frozenset()
    assert len(registry.audit()) == 3


def test_a_refused_change_changes_nothing(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    stamp = registry.stamp()
    with pytest.raises(PromotionError, match="is the champion; run `autotts rollback` first"):
        registry.install(spec(1), {"headline": "other"}, RolloutStage.SHADOW, 0, ME)
    assert (registry.stamp(), registry.card(spec(1).digest)["headline"]) == (stamp, "fine")


def test_several_reads_share_a_session(registry: Registry) -> None:
    with registry.session() as opened:
        assert (opened.read(), opened.cards(), opened.audit()) == (RolloutState(), ({}, {}), [])
    after = registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    with registry.session() as opened:
        assert (opened.read(), opened.cards()) == (after, ({spec(1).digest: registry.card(spec(1).digest)}, {}))
        assert opened.spec(opened.find(spec(1).digest[:8])) == spec(1)


# Models


def test_a_built_in_controller_is_installed_by_its_name(registry: Registry) -> None:
    for name in ("cmc", "asc@64"):
        registry.install(Spec(name), CARD, RolloutStage.CHAMPION, 0, ME, "small")
        digest = registry.read().own("small").champion
        assert digest == Spec(name).digest
        assert registry.spec(digest) == Spec(name)
        assert registry.card(digest)["built_in"] is True
    assert registry.digests() == sorted([Spec("cmc").digest, Spec("asc@64").digest])
    assert registry.find(Spec("cmc").digest[:8]) == Spec("cmc").digest
    registry.roll_back(ME, "small")
    assert registry.read().own("small").champion == Spec("cmc").digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "esc"}, "the name does not match the hash"),
        ({"built_in": False}, "there is a built-in controller cmc"),
        ({"built_in": "yes"}, "there is a built-in controller cmc"),
    ],
)
def test_a_changed_card_of_a_built_in_controller_is_refused(
    registry: Registry, change: dict[str, Any], message: str
) -> None:
    registry.install(Spec("cmc"), CARD, RolloutStage.CHAMPION, 0, ME)
    digest = Spec("cmc").digest
    write_card(registry, digest, json.dumps({**registry.card(digest), **change}).encode())
    with pytest.raises(PromotionError, match=rf"{digest[:12]}.*: .*{message}.*promote the controller's file again"):
        registry.spec(Spec("cmc").digest)


def test_a_damaged_card_hides_no_other_and_a_missing_one_is_named(registry: Registry) -> None:
    for number in (1, 2):
        registry.install(spec(number), CARD, RolloutStage.SHADOW, 0, ME)
    damaged, kept, missing = spec(1).digest, spec(2).digest, spec(3).digest
    write_card(registry, damaged, b"{")
    cards = registry.cards()
    assert cards.readable == {kept: registry.card(kept)}
    assert list(cards.damaged) == [damaged]
    assert "promote the controller's file again" in cards.damaged[damaged]
    assert registry.cards([missing, kept]).readable == {kept: registry.card(kept)}
    assert list(registry.cards([missing, kept]).damaged) == [missing]


def test_the_audit_log_records_the_model_of_a_change(registry: Registry) -> None:
    first, second = spec(1).digest, spec(2).digest
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.install(spec(2), CARD, RolloutStage.CANARY, 0.5, ME, "small")
    registry.promote(second, RolloutStage.CHAMPION, 0, ME, "small")
    registry.promote(second, RolloutStage.CANARY, 0.25, ME, "large")
    registry.promote(second, RolloutStage.SHADOW, 0, ME)
    registry.quarantine(second, ME)
    lines = registry.audit()
    assert [line.get("model") for line in lines] == [None, "small", "small", "large", None, None]
    assert [line["share"] for line in lines] == [0, 0.5, 0, 0.25, 0, 0]
    assert lines[2]["before"] == {"canary": second, "champion": None}
    assert lines[2]["after"] == {"canary": None, "champion": second}
    assert [line for line in lines if "models" in line] == [lines[5]]
    assert (lines[5]["before"], lines[5]["after"]) == ({"shadow": second}, {"shadow": None})
    assert lines[5]["models"] == {
        "large": {"before": {"canary": second}, "after": {"canary": None}},
        "small": {"before": {"champion": second}, "after": {"champion": None}},
    }
    consistent(registry)
    assert registry.read().default.champion == first


def test_a_change_of_one_model_leaves_the_others_as_they_were(registry: Registry) -> None:
    registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.install(spec(2), CARD, RolloutStage.CHAMPION, 0, ME, "small")
    before = registry.install(spec(3), CARD, RolloutStage.CHAMPION, 0, ME, "large")
    registry.install(spec(4), CARD, RolloutStage.CANARY, 0.5, ME, "small")
    registry.drop_canary(spec(4).digest, ME, "small")
    assert registry.read().models == before.models
    after = registry.roll_back(ME, "small")
    assert (after.default, after.own("large")) == (before.default, before.own("large"))
    assert after.of_model("small").holders.champion == spec(1).digest


def test_a_rollback_of_a_model_to_a_changed_file_is_refused(registry: Registry) -> None:
    for number in (1, 2):
        registry.install(spec(number), CARD, RolloutStage.CHAMPION, 0, ME, "small")
    write_source(registry, spec(1).digest, b"# 3\n")
    with pytest.raises(PromotionError, match="does not match the hash in its name"):
        registry.roll_back(ME, "small")
    assert registry.read().own("small").champion == spec(2).digest


def consistent(registry: Registry) -> RolloutState:
    """Return the rollout state after checking that its files are readable and its audit log is complete."""
    installed = registry.read()
    for holder in installed.staged:
        assert registry.spec(holder).digest == holder
    audit = registry.audit()
    assert [line["version"] for line in audit] == list(range(1, installed.version + 1))
    return installed


# Concurrent changes


@pytest.mark.process
def test_concurrent_writers_are_serialized(registry: Registry) -> None:
    assert sorted(run_together(WRITER.replace("10**6", "20"), registry.place, 3)) == list(range(1, 61))
    assert consistent(registry).version == 60


@pytest.mark.process
def test_a_promotion_by_several_processes_at_once_is_one(registry: Registry) -> None:
    install = "print(registry.install(spec(1), CARD, RolloutStage.CHAMPION, 0, ME, 'small').version)"
    assert run_together(f"{BEGIN}{install}", registry.place, 3) == [1] * 3
    assert [line["action"] for line in registry.audit()] == ["install as champion"]
    assert consistent(registry).own("small").previous == (None,)


@pytest.mark.process
def test_of_several_rollbacks_of_the_same_version_one_is_made(registry: Registry) -> None:
    for number in (1, 2, 3):
        registry.install(spec(number), CARD, RolloutStage.CHAMPION, 0, ME)
    roll_back = """
with suppress(PromotionError):
    print(registry.roll_back(replace(ME, version=3)).version)
"""
    assert run_together(f"{BEGIN}{roll_back}", registry.place, 3) == [4]
    assert consistent(registry).default.champion == spec(2).digest


@pytest.mark.process
def test_concurrent_changes_of_all_kinds_make_one_valid_history(registry: Registry) -> None:
    changes = """
for number in range(15):
    model = (None, "small")[number % 2]
    with suppress(PromotionError):
        if number % 5 == 4:
            after = registry.roll_back(ME, model)
        elif number % 5 == 3:
            after = registry.drop_canary(registry.read().own(model).canary or "", ME, model)
        else:
            stage = (RolloutStage.CANARY, RolloutStage.CHAMPION)[number % 5 == 2]
            after = registry.install(spec(3 * writer + number % 3), CARD, stage, 0.5, ME, model)
        print(after.version)
"""
    versions = run_together(f"{BEGIN}{changes}", registry.place, 3)
    assert consistent(registry).version == len(set(versions)) == max(versions)
    assert replayed(registry) == {
        (model, stage): holder
        for model in (None, "small")
        for stage, holder in registry.read().own(model).stages.items()
        if holder is not None
    }


def replayed(registry: Registry) -> dict[tuple[str | None, str], str]:
    """Return the controllers at all stages by the audit log, after checking that each line follows the one before."""
    holders: dict[tuple[str | None, str], str | None] = {}
    for line in registry.audit():
        model = line.get("model")
        for stage, before in line["before"].items():
            assert holders.get((model, stage)) == before
            holders[model, stage] = line["after"][stage]
    return {place: holder for place, holder in holders.items() if holder is not None}


# Requirements of a promotion


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (None, "needs a passed gate"),
        ({"digest": "a" * 64, "verdict": "promote"}, "the report is about aaaaaaaaaaaa"),
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
    path.write_text(
        json.dumps({"digest": spec(1).digest, "verdict": "promote", "headline": "better by 2", "cells": HELD_OUT_CELLS})
    )
    install(registry, spec(1), card_of(spec(1), path), RolloutStage.CANARY, 0.1, ME)
    card = registry.card(spec(1).digest)
    assert (card["headline"], card["report"]["verdict"], card["forced"]) == ("better by 2", "promote", False)


def passed(folder: Path, model: str = "", **more: Any) -> Path:
    """Write a report of the gate, on all models or on one, and return its path."""
    path = folder / "report.json"
    report = {
        "digest": spec(1).digest,
        "verdict": "promote",
        "headline": "better",
        "model": model,
        "cells": HELD_OUT_CELLS,
    }
    path.write_text(json.dumps(report | more))
    return path


@pytest.mark.parametrize("field", ["models_left_out", "benchmarks_left_out"])
def test_a_report_on_a_selection_is_for_the_judged_models_only(registry: Registry, tmp_path: Path, field: str) -> None:
    left_out: dict[str, Any] = {field: ["other", "third"]}
    card = card_of(spec(1), passed(tmp_path, **left_out))
    message = rf"on model m only, not on all models \({field}: other, third\); give --model, or run the gate without"
    with pytest.raises(PromotionError, match=message):
        install(registry, spec(1), card, RolloutStage.SHADOW, 0, ME)
    with pytest.raises(PromotionError, match="not on other"):
        install(registry, spec(1), card, RolloutStage.SHADOW, 0, ME, "other")
    install(registry, spec(1), card, RolloutStage.CHAMPION, 0, ME, "m")
    with pytest.raises(PromotionError, match=message):
        promote_known(registry, spec(1).digest, RolloutStage.CHAMPION, 0, ME)


def test_a_sequence_on_one_of_several_benchmarks_is_for_all_models(registry: Registry, tmp_path: Path) -> None:
    looked = passed(tmp_path, benchmarks_left_out=["other"], sequence={"look": 1})
    install(registry, spec(1), card_of(spec(1), looked), RolloutStage.CHAMPION, 0, ME)
    assert "models" not in registry.card(spec(1).digest)


def test_a_report_on_one_model_is_for_that_model_only(registry: Registry, tmp_path: Path) -> None:
    card = card_of(spec(1), passed(tmp_path, "small"))
    for model, where in ((None, "all models"), ("large", "large")):
        with pytest.raises(PromotionError, match=f"passed the gate on model small only, not on {where}; give --model"):
            install(registry, spec(1), card, RolloutStage.SHADOW, 0, ME, model)
    install(registry, spec(1), card, RolloutStage.CHAMPION, 0, ME, "small")
    assert registry.card(spec(1).digest)["models"] == ["small"]
    with pytest.raises(PromotionError, match="passed the gate on model small only, not on all models"):
        check_models(registry.card(spec(1).digest), None)
    check_models(registry.card(spec(1).digest), "small")


def test_reports_on_several_models_add_up_on_the_card(registry: Registry, tmp_path: Path) -> None:
    for model in ("small", "large"):
        card = card_of(spec(1), passed(tmp_path, model))
        install(registry, spec(1), card, RolloutStage.CHAMPION, 0, ME, model)
    assert registry.card(spec(1).digest)["models"] == ["large", "small"]
    install(registry, spec(1), card_of(spec(1), passed(tmp_path)), RolloutStage.SHADOW, 0, ME)
    assert "models" not in registry.card(spec(1).digest)  # all models
    install(registry, spec(1), card_of(spec(1), passed(tmp_path, "third")), RolloutStage.SHADOW, 0, ME, "third")
    assert "models" not in registry.card(spec(1).digest)


def test_a_built_in_controller_needs_no_report_but_a_report_must_have_passed(
    registry: Registry, tmp_path: Path
) -> None:
    install(registry, Spec("asc"), card_of(Spec("asc"), None), RolloutStage.CHAMPION, 0, ME, "small")
    assert registry.card(Spec("asc").digest)["headline"] == "built in"
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"digest": Spec("esc").digest, "verdict": "undecided"}))
    with pytest.raises(PromotionError, match="verdict is 'undecided'"):
        install(registry, Spec("esc"), card_of(Spec("esc"), path), RolloutStage.CHAMPION, 0, ME, "small")


@pytest.mark.parametrize("text", ["", "[]", "7"])
def test_an_invalid_gate_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(PromotionError, match=r"report\.json"):
        card_of(spec(1), path)


@pytest.mark.process
def test_reports_on_several_models_that_are_promoted_at_once_all_count(registry: Registry) -> None:
    promoting = """
from discovery.commands.promote import install
report = {"digest": spec(1).digest, "verdict": "promote", "model": f"model-{writer}", "cells": HELD_OUT_CELLS}
card = {"headline": "better", "report": report}
print(install(registry, spec(1), card, RolloutStage.CHAMPION, 0, ME, f"model-{writer}").version)
"""
    assert sorted(run_together(f"{BEGIN}{promoting}", registry.place, 2)) == [1, 2]
    assert registry.card(spec(1).digest)["models"] == ["model-0", "model-1"]
