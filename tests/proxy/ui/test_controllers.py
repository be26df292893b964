"""Controllers page: it shows the registry, changes it by the rules of the command line, and writes the audit trail."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import pytest_asyncio

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.commands.promote import promote_known
from discovery.promotion.registry import ChangeCause, Registry
from proxy.server import running
from proxy.settings import load
from proxy.ui.sources.highlighted import diff_html, python_html
from tests.discovery.promotion.outside import PLACES, new_place, write_card
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL
from tests.proxy.ui.conftest import ALICE, BOSS, Browser, PageReply
from tests.proxy.ui.test_rendering import Tags

HOSTILE = "<script>alert(1)</script>"
SOURCE = f'''"""{HOSTILE}"""
from controllers import TO_END, Action, State, answer, branch


class One:
    def __init__(self, beta: float) -> None:
        pass

    def decide(self, state: State) -> list[Action]:
        return [answer(state.leader())] if state.width else [branch(TO_END)]
'''
POINT = ("beta", "tokens", "accuracy")
CARD: dict[str, Any] = {
    "headline": f"better {HOSTILE}",
    "report": {
        "headline": "+4 points", "verdict": "promote", "questions": 400, "delta_afs": 4.0, "interval": [2.0, 6.0],
        "p": 0.001, "alpha": 0.03, "mde": 2.1,
        "conditions": [{"name": "failures", "held": True, "words": f"none {HOSTILE}"}],
    },
    "discovery": {
        "explorer": "grammar", "note": HOSTILE, "data": {"questions": 9, "cells": [HOSTILE]},
        "cost": {"usd": 0.0, "candidates": 12},
        "search": {"cells": [{"cell": ["m", HOSTILE], "points": [{"beta": 0.5, "tokens": 900, "accuracy": 70}]}]},
    },
}  # fmt: skip


@pytest.fixture(params=PLACES)
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """Return a registry with one controller as the champion, in a folder and in PostgreSQL."""
    made = Registry(new_place(request, request.param, tmp_path / "registry"))
    cause = ChangeCause("tests", HOSTILE, datetime(2026, 3, 1, tzinfo=UTC), forced=True)
    made.install(Spec("mine", SOURCE), CARD, RolloutStage.CHAMPION, 0.0, cause)
    return made


@pytest_asyncio.fixture
async def admin(backend: FakeVLLM, key_file: Path, registry: Registry) -> AsyncIterator[Browser]:
    """Sign in as admin at a proxy with a registry. Controllers from files run unsealed, so no process is started."""
    settings = load(
        upstream=backend.url, keys=key_file, admin_key=BOSS, registry=registry.place, sandbox_pool=0,
        allow_unsandboxed=True, **SMALL,
    )  # fmt: skip
    async with running(settings) as url:
        browser = Browser(url)
        await browser.sign_in(BOSS)
        yield browser
        await browser.close()


async def change(browser: Browser, **fields: str) -> PageReply:
    """Ask for a change, and confirm it."""
    shown = await browser.get(f"/ui/controllers/change?{urlencode(fields)}")
    assert shown.status == 200, shown.text
    version = shown.text.partition('name="version" value="')[2].partition('"')[0]
    return await browser.post("/ui/controllers/change", {"version": version, "why": "a test", **fields})


async def test_the_page_shows_stages_cards_and_the_audit_trail(admin: Browser, registry: Registry) -> None:
    page = await admin.get("/ui/controllers")
    (digest,) = registry.digests()
    assert page.status == 200
    assert f'<a href="/ui/controllers/card/{digest}">mine</a>' in page.text
    assert "install as champion" in page.text
    assert "Roll back the champion of the default" in page.text
    assert "Roll back the canary" not in page.text
    await change(admin, what="cmc", stage="canary")
    page = await admin.get("/ui/controllers")
    assert '<td data-label="Why" class="wide">built in; a test (ui: admin)</td>' in page.text


async def test_a_card_shows_its_curve_gate_report_and_source(admin: Browser, registry: Registry) -> None:
    page = await admin.get(f"/ui/controllers/card/{registry.digests()[0]}")
    assert page.status == 200
    for text in ("Gate: promote", "400 held-out questions", "2.10 points", "12 candidates", "Accuracy over tokens"):
        assert text in page.text
    assert 'class="py-k' in page.text  # highlighted


async def test_hostile_names_reasons_and_sources_are_inert(admin: Browser, registry: Registry) -> None:
    for path in ("/ui/controllers", f"/ui/controllers/card/{registry.digests()[0]}"):
        page = await admin.get(path)
        assert HOSTILE not in page.text
        assert "alert(1)" in page.text
        assert all((script.get("src") or "").startswith("/ui/static/") for script in Tags(page.text).executed)


async def test_a_canary_is_tried_promoted_and_rolled_back(admin: Browser, registry: Registry) -> None:
    (mine,) = registry.digests()
    assert (await change(admin, what="cmc", stage="canary", percent="25")).status == 303
    state = registry.read()
    assert (state.default.canary, state.default.share) == (Spec("cmc").digest, 0.25)
    assert (await change(admin, what="cmc", stage="champion")).status == 303
    assert registry.read().default.champion == Spec("cmc").digest
    assert (await change(admin, action="rollback")).status == 303
    assert registry.read().default.champion == mine
    latest = registry.audit()[-1]
    assert (latest["who"], latest["action"], latest["why"]) == ("ui: admin", "rollback", "a test")


async def test_the_canary_alone_is_rolled_back(admin: Browser, registry: Registry) -> None:
    before = registry.read().default.champion
    await change(admin, what="cmc", stage="canary")
    assert "Roll back the canary of the default" in (await admin.get("/ui/controllers")).text
    page = await admin.get("/ui/controllers/change?action=drop")
    assert "is no canary any more; the champion of all models" in page.text
    assert (await change(admin, action="drop")).status == 303
    assert (registry.read().default.canary, registry.read().default.champion) == (None, before)
    assert registry.audit()[-1]["action"] == "drop canary"


async def test_a_model_gets_a_champion_of_its_own(admin: Browser, registry: Registry) -> None:
    assert (await change(admin, what="cmc", stage="champion", model="fake-model")).status == 303
    assert registry.read().own("fake-model").champion == Spec("cmc").digest
    assert "Roll back the champion of fake-model" in (await admin.get("/ui/controllers")).text


async def test_the_confirmation_says_what_will_happen_and_changes_nothing(admin: Browser, registry: Registry) -> None:
    before = registry.read()
    page = await admin.get("/ui/controllers/change?what=cmc&stage=canary&percent=5")
    assert "cmc serves 5 % of the requests of all models without a champion of their own as the canary" in page.text
    page = await admin.get("/ui/controllers/change?action=rollback")
    assert "the configured controller serves" in page.text
    assert registry.read() == before


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"what": "nobody", "stage": "canary"}, "matches 0 digests"),
        ({"what": "everything", "stage": "champion"}, "matches 0 digests"),
        ({"what": "", "stage": "canary"}, "name the controller"),
        ({"what": "cmc", "stage": "boss"}, "is not one of shadow, canary, champion"),
        ({"what": "cmc", "stage": "canary", "percent": "101"}, "is not a number from 0 to 100"),
        ({"what": "cmc", "stage": "canary", "model": "\u0007"}, "is not the name of a model"),
        ({"action": "rollback", "model": "unknown"}, "has neither a canary nor a champion"),
        ({"action": "drop"}, "is not the canary"),
        ({"what": "cmc", "stage": "canary", "why": " "}, "give a reason"),
        ({"what": "cmc", "stage": "canary", "version": "0"}, "changed meanwhile"),
        ({"what": "cmc", "stage": "canary", "version": ""}, "version: missing"),
        ({"what": "cmc", "stage": "canary", "version": "x"}, "version: "),
    ],
)
async def test_impossible_changes_are_refused_with_the_reason(
    admin: Browser, registry: Registry, fields: dict[str, str], problem: str
) -> None:
    before = registry.read()
    reply = await admin.post("/ui/controllers/change", {"version": str(before.version), "why": "a test", **fields})
    assert reply.status == 400
    assert problem in reply.text
    assert registry.read() == before


async def test_a_change_that_is_made_during_a_confirmed_one_is_not_lost(
    admin: Browser, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(registry: Registry, *rest: Any) -> Any:
        registry.roll_back(ChangeCause("watcher", "it failed", datetime(2026, 3, 2, tzinfo=UTC)))
        return promote_known(registry, *rest)

    monkeypatch.setattr("proxy.ui.pages.controllers.promote_known", late)
    reply = await change(admin, what="cmc", stage="champion")
    assert reply.status == 400
    assert "changed meanwhile" in reply.text
    assert registry.read().default.champion is None


@pytest.mark.parametrize(
    "card",
    [
        {"discovery": ["by hand"]},
        {"headline": "x", "discovery": {"explorer": "me", "data": 5}, "report": {"verdict": "promote"}},
        {"headline": None, "discovery": {"search": {"cells": [{"cell": 5}]}}, "report": [1]},
        {
            "discovery": {"search": {"cells": [{"cell": ["m"], "points": [dict.fromkeys(POINT, math.nan)]}]}},
            "report": CARD["report"] | {"p": math.nan, "delta_afs": math.inf},
        },
    ],
)
async def test_cards_that_were_written_by_hand_are_shown_as_far_as_they_go(
    admin: Browser, registry: Registry, card: dict[str, Any]
) -> None:
    cause = ChangeCause("tests", "", datetime(2026, 3, 1, tzinfo=UTC), forced=True)
    spec = Spec("by_hand", SOURCE.replace("One", "Two"))
    registry.install(spec, card, RolloutStage.SHADOW, 0.0, cause)
    for path in ("/ui/controllers", f"/ui/controllers/card/{spec.digest}"):
        page = await admin.get(path)
        assert page.status == 200
        assert "by_hand" in page.text


async def test_a_controller_that_failed_the_gate_of_another_model_is_refused(
    admin: Browser, registry: Registry
) -> None:
    cause = ChangeCause("tests", "", datetime(2026, 3, 1, tzinfo=UTC), forced=True)
    spec = Spec("other", SOURCE.replace("One", "Two"))
    registry.install(spec, {"headline": "", "report": None, "models": ["m1"]}, RolloutStage.SHADOW, 0.0, cause, "m1")
    reply = await change(admin, what=spec.digest, stage="canary")
    assert reply.status == 400
    assert "passed the gate on model m1 only" in reply.text


async def test_clients_can_neither_see_nor_change_controllers(admin: Browser, registry: Registry) -> None:
    client = Browser(admin.url)
    await client.sign_in(ALICE)
    before = registry.read()
    for reply in (
        await client.get("/ui/controllers"),
        await client.get(f"/ui/controllers/card/{registry.digests()[0]}"),
        await client.get("/ui/controllers/change?what=cmc&stage=canary"),
        await client.post("/ui/controllers/change", {"action": "rollback", "why": "x", "version": str(before.version)}),
    ):
        assert reply.status == 403
    assert "/ui/controllers" not in (await client.get("/ui")).text
    assert registry.read() == before
    await client.close()


async def test_a_change_without_the_token_is_refused(admin: Browser, registry: Registry) -> None:
    before = registry.read()
    admin.csrf = "wrong"
    assert (await admin.post("/ui/controllers/change", {"action": "rollback", "why": "x"})).status == 403
    assert registry.read() == before


async def test_without_a_registry_the_page_says_how_to_get_one(local: Browser) -> None:
    page = await local.get("/ui/controllers")
    assert page.status == 200
    assert "AUTOTTS_REGISTRY" in page.text
    refused = await local.post("/ui/controllers/change", {"action": "rollback", "why": "x", "version": "0"})
    assert refused.status == 400


async def test_an_unknown_card_is_not_found(admin: Browser) -> None:
    assert (await admin.get("/ui/controllers/card/nothing")).status == 404


def test_highlighted_text_is_escaped() -> None:
    assert "<script>" not in python_html(f"x = '{HOSTILE}'  # {HOSTILE}")
    difference = diff_html("a = 1", f"a = '{HOSTILE}'", (HOSTILE, "new"))
    assert "<script>" not in difference
    assert 'class="py-gi"' in difference
    assert not diff_html("same", "same", ("a", "b"))


async def test_a_damaged_card_is_named_beside_the_controllers_that_can_be_read(
    admin: Browser, registry: Registry
) -> None:
    cause = ChangeCause("tests", "", datetime(2026, 3, 1, tzinfo=UTC))
    registry.install(Spec("esc"), {"headline": "kept"}, RolloutStage.SHADOW, 0.0, cause)
    damaged = Spec("mine", SOURCE).digest
    write_card(registry, damaged, b"{")
    page = await admin.get("/ui/controllers")
    assert page.status == 200
    assert f'href="/ui/controllers/card/{Spec("esc").digest}">esc</a>' in page.text
    assert "damaged card" in page.text
    assert "promote the controller&#39;s file again" in page.text
    card = await admin.get(f"/ui/controllers/card/{damaged}")
    assert (card.status, "promote the controller&#39;s file again" in card.text) == (400, True)
    assert (await admin.get(f"/ui/controllers/card/{Spec('esc').digest}")).status == 200
    drop = await admin.get("/ui/controllers/change?" + urlencode({"what": damaged, "stage": "shadow"}))
    assert f"{damaged[:12]} (its card is damaged)" in drop.text
