"""Copies of registries and ledgers, between folders and PostgreSQL in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from typer.testing import CliRunner

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.errors import GateError, PromotionError
from discovery.promotion.copying import copy_ledger, copy_registry
from discovery.promotion.ledger import Ledger
from discovery.promotion.registry import Registry
from discovery.store import DatabaseUrl, StorePlace
from proxy.cli import app
from tests.discovery.promotion.examples import CARD, ME, spec
from tests.discovery.promotion.outside import (
    ledger_lines,
    new_place,
    write_audit,
    write_ledger,
    write_source,
    write_state,
)
from tests.discovery.promotion.test_ledger import judged
from tests.discovery.promotion.test_registry import consistent

NewPlace = Callable[[], StorePlace]
DIRECTIONS = [
    "files-files",
    pytest.param("files-postgres", marks=pytest.mark.process),
    pytest.param("postgres-files", marks=pytest.mark.process),
    pytest.param("postgres-postgres", marks=pytest.mark.process),
]


@pytest.fixture(params=DIRECTIONS)
def places(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[NewPlace, NewPlace]:
    """Return functions that make new places to copy from and to."""
    numbers: Iterator[int] = count()

    def new(kind: str) -> StorePlace:
        return new_place(request, kind, tmp_path / str(next(numbers)))

    source, target = request.param.split("-")
    return lambda: new(source), lambda: new(target)


def filled(place: StorePlace) -> Registry:
    """Return a registry with controllers at stages, a former champion, a built-in one and a quarantine."""
    registry = Registry(place)
    for number in (1, 2):
        registry.install(spec(number), CARD, RolloutStage.CHAMPION, 0, ME)
    registry.install(Spec("asc"), CARD, RolloutStage.CANARY, 0.25, ME, "small")
    registry.quarantine(spec(1).digest, ME)
    return registry


def test_a_copied_registry_is_the_same_and_goes_on(places: tuple[NewPlace, NewPlace]) -> None:
    source, target = filled(places[0]()), Registry(places[1]())
    copy_registry(source, target)
    for _ in range(2):
        assert (target.read(), target.audit(), target.cards()) == (source.read(), source.audit(), source.cards())
        assert [target.spec(digest) for digest in target.digests()] == [source.spec(it) for it in source.digests()]
        copy_registry(source, target)  # again, which changes nothing
    target.install(spec(3), CARD, RolloutStage.SHADOW, 0, ME)
    assert consistent(target).version == source.read().version + 1
    with pytest.raises(PromotionError, match=rf"{re.escape(str(target.place))}: it holds .*nothing was copied"):
        copy_registry(source, target)


def test_an_interrupted_copy_goes_on(places: tuple[NewPlace, NewPlace]) -> None:
    source, target = filled(places[0]()), Registry(places[1]())
    lines = source.storage.audit_lines()
    for part in (lines[:-1], lines[:1], []):
        copy_registry(source, target)
        write_state(target, None)
        write_audit(target, part)
        copy_registry(source, target)
        assert (target.read(), target.storage.audit_lines()) == (source.read(), lines)
    write_state(target, None)
    write_audit(target, [b"{}"])
    with pytest.raises(PromotionError):
        copy_registry(source, target)
    write_audit(target, lines[1:])
    with pytest.raises(PromotionError, match="it holds another registry"):
        copy_registry(source, target)


def test_a_registry_that_was_changed_is_not_copied(places: tuple[NewPlace, NewPlace]) -> None:
    target = Registry(places[1]())
    source = filled(places[0]())
    write_source(source, spec(1).digest, b"# other\n")
    with pytest.raises(PromotionError, match="does not match the hash"):
        copy_registry(source, target)
    source = filled(places[0]())
    lines = source.storage.audit_lines()
    write_audit(source, [lines[0].replace(b'"me"', b'"us"', 1), *lines[1:]])
    with pytest.raises(PromotionError, match="line 2 does not follow line 1"):
        copy_registry(source, target)
    with pytest.raises(PromotionError, match="there is no registry to copy"):
        copy_registry(Registry(places[0]()), target)
    assert (target.stamp(), target.digests()) == (None, [])


def test_a_copied_ledger_is_the_same_and_goes_on(places: tuple[NewPlace, NewPlace]) -> None:
    source, target = Ledger(places[0]()), Ledger(places[1]())
    judged(source)
    judged(source)
    assert copy_ledger(source, target) == 2
    judged(source)
    assert copy_ledger(source, target) == 3  # the one that was added
    assert ledger_lines(target.place) == ledger_lines(source.place)
    assert judged(target) == 4
    with pytest.raises(GateError, match=rf"{re.escape(str(target.place))}: it has other .*nothing was copied"):
        copy_ledger(source, target)


def test_a_ledger_that_was_changed_is_not_copied(places: tuple[NewPlace, NewPlace]) -> None:
    source, target = Ledger(places[0]()), Ledger(places[1]())
    with pytest.raises(GateError, match="there is no judgement to copy"):
        copy_ledger(source, target)
    judged(source)
    judged(source)
    write_ledger(source.place, ledger_lines(source.place)[1:])
    with pytest.raises(GateError, match="line 1 is not the first line of the log"):
        copy_ledger(source, target)
    assert target.lines() == []


def test_nothing_is_copied_into_itself(places: tuple[NewPlace, NewPlace]) -> None:
    registry, ledger = filled(places[0]()), Ledger(places[0]())
    judged(ledger)
    with pytest.raises(PromotionError, match="cannot be copied into itself"):
        copy_registry(registry, Registry(registry.place))
    with pytest.raises(GateError, match="cannot be copied into itself"):
        copy_ledger(ledger, Ledger(ledger.place))


def test_the_commands_copy_a_registry_with_its_ledger(
    places: tuple[NewPlace, NewPlace], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = filled(places[0]()), places[1]()
    own = source.place if isinstance(source.place, DatabaseUrl) else source.place / "ledger.jsonl"
    judged(Ledger(own))
    url = next((place for place in (source.place, target) if isinstance(place, DatabaseUrl)), None)
    if url is not None and url.password is not None:
        monkeypatch.setenv("PGPASSWORD", url.password)
    done = CliRunner().invoke(app, ["registry", "copy", str(source.place), str(target)])
    assert (done.exit_code, "3 controllers, 4 changes, 1 judgements; all are as in" in done.output) == (0, True)
    assert Registry(target).read() == source.read()
    other = places[1]()
    done = CliRunner().invoke(app, ["registry", "copy-ledger", str(own), str(other)])
    assert (done.exit_code, "1 judgements; all are as in" in done.output) == (0, True)
