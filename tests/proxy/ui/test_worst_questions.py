"""Traces of a candidate's worst questions: played sealed, in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from discovery.commands.discover import RECORD
from discovery.data.recordings import RecordedBranch, Split
from discovery.search.cascade import CandidateVerdict
from discovery.search.explorers import Candidate
from discovery.search.history import History
from discovery.store import Store
from proxy.errors import ApiError
from proxy.server import running
from proxy.settings import load
from proxy.ui.sources.worst_questions import worst_questions
from tests import large_store
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL
from tests.proxy.ui.conftest import ALICE, BOSS, Browser
from tests.proxy.ui.test_controllers import SOURCE

SIGNALS = [900] * 4, [800] * 4, [700] * 3
"""Confidence of each branch's intervals, of their least confident windows, and of its probes."""
FOUND = Candidate("grammar-1-0", SOURCE.replace("class One:", 'class One:\n    signals = ("intervals",)\n'), "grammar")
WORST = "/ui/discovery/candidate/worst?run=first&digest="


async def fill(store: Path, runs: Path, **changes: Any) -> None:
    """Write recordings of the search split, and a run that has tried one candidate on them.

    `changes` are settings of the run.
    """
    (runs / "first").mkdir(parents=True)
    *recordings, other = (replace(each, split=Split.SEARCH, model="m") for each in large_store.recordings(10))
    wrong, right = (RecordedBranch([None, text, text], 150, text, [9] * 3, True, *SIGNALS) for text in "97")
    recordings = [
        replace(each, benchmark="sums", reference="7", branches=([wrong, right] if number % 2 else [right, wrong]) * 4)
        for number, each in enumerate(recordings)
    ]
    async with Store.open(store, create=True) as opened:
        await opened.add([*recordings, replace(other, benchmark="unlabelled", reference=None)])
    settings = {"explorer": "grammar", "seed": 3, "questions": 9, "cells": ["m sums search"]}
    settings |= {"probe_tokens": 8, "signals": ["intervals", "probes"]} | changes
    history = History.begin(runs / "first" / RECORD, settings)
    history.append("proposed", {"step": 0, "candidates": [asdict(FOUND)]})
    history.append("judged", {"step": 0, "verdicts": [asdict(CandidateVerdict(FOUND.digest, 60.0, 60.0))]})


@pytest_asyncio.fixture
async def admin(backend: FakeVLLM, key_file: Path, tmp_path: Path) -> AsyncIterator[Browser]:
    """Sign in as admin at a proxy with a run and its recordings."""
    store, runs = tmp_path / "s.db", tmp_path / "runs"
    await fill(store, runs)
    settings = load(upstream=backend.url, keys=key_file, admin_key=BOSS, ui_runs=runs, store=store, **SMALL)
    async with running(settings) as url:
        browser = Browser(url)
        await browser.sign_in(BOSS)
        yield browser
        await browser.close()


@pytest.mark.process
async def test_the_episodes_that_a_candidate_decided_worst_are_shown(admin: Browser) -> None:
    page = await admin.get(f"/ui/discovery/candidate?run=first&digest={FOUND.digest}")
    assert "Its worst questions" in page.text
    page, again = await asyncio.gather(admin.get(f"{WORST}{FOUND.digest}"), admin.get(f"{WORST}{FOUND.digest}"))
    assert page.status == 200, page.text
    assert "Episode 1 (cell 1, β = 0.5): stopped before seeing the correct answer." in page.text
    assert "4 of 8 recorded chains end with the correct answer" in page.text
    assert again.text == page.text


async def test_clients_see_no_traces_and_unknown_candidates_have_none(admin: Browser) -> None:
    assert (await admin.get(f"{WORST}{'0' * 64}")).status == 404
    client = Browser(admin.url)
    await client.sign_in(ALICE)
    assert (await client.get(f"{WORST}{FOUND.digest}")).status == 403
    await client.close()


@pytest.mark.process
@pytest.mark.parametrize(("signals", "is_shown"), [([], False), (["intervals"], True)])
async def test_traces_show_the_signals_that_the_run_showed(tmp_path: Path, signals: list[str], is_shown: bool) -> None:
    store, runs = tmp_path / "s.db", tmp_path / "runs"
    await fill(store, runs, signals=signals)
    text = await worst_questions(store, runs / "first", FOUND.digest)
    assert ("(900)" in text) is is_shown


@pytest.mark.process
async def test_a_run_of_another_version_is_named_as_the_reason(tmp_path: Path) -> None:
    store, runs = tmp_path / "s.db", tmp_path / "runs"
    await fill(store, runs, signals=["no such signal"])
    with pytest.raises(ApiError, match="it cannot be replayed: another version of autotts wrote the history"):
        await worst_questions(store, runs / "first", FOUND.digest)


@pytest.mark.process
async def test_recordings_that_are_gone_are_named_as_the_reason(admin: Browser, tmp_path: Path) -> None:
    (tmp_path / "s.db").unlink()
    reply = await admin.get(f"{WORST}{FOUND.digest}", headers={"hx-request": "true"})
    assert reply.status == 500
    assert "it cannot be replayed: " in reply.text
