"""A proxy on the real vLLM with everything that the dashboard shows: recordings, a registry, runs and a calibration."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from deploy.embedded.task import held_back
from discovery.commands.promote import install, promote_known
from discovery.data.importers import format_recording_line, read_jsonl
from discovery.data.recordings import RecordedQuestion, Split
from discovery.promotion.registry import ChangeCause, Registry
from discovery.store import Store
from discovery.store.records import stored_time
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.browser.conftest import until_recorded
from tests.readability import ROOT

MODEL: Final = "autotts-tiny"
CHAMPION: Final = ROOT / "deploy" / "embedded" / "champion"
CANDIDATE: Final = "grammar-136-5"
SENT: Final = [(0.25, "cmc", 2), (0, "adaptive_consistency", 3)]
"""β, controller and number of the problem of the requests that are sent before the pages are opened."""


class EmbeddedDashboard(NamedTuple):
    """A running proxy, and the files that it shows."""

    url: str
    store: Path
    registry: Registry
    runs: Path
    good: Path  # a file of two recordings that can be imported
    bad: Path  # the same with a wrong third line
    requests: list[str]  # ids, in the order in which they were sent


def recordings() -> list[RecordedQuestion]:
    """Return the recordings that are published with the champion, half of them as questions of the search split."""
    published = read_jsonl(CHAMPION / "recordings.jsonl.xz")
    return [
        replace(each, split=Split.SEARCH if number % 2 else Split.HELD_OUT) for number, each in enumerate(published)
    ]


@asynccontextmanager
async def embedded_dashboard(vllm: str, folder: Path) -> AsyncIterator[EmbeddedDashboard]:
    """Serve the embedded model without keys, ask it some questions today, and let others have been asked yesterday."""
    runs, store, registry = folder / "runs", folder / "autotts.db", Registry(folder / "registry")
    runs.mkdir()
    async with Store.open(store, create=True) as opened:
        await opened.add(recordings())
    _fill_registry(registry)
    lines = [format_recording_line(replace(each, question=f"{n}" * 64)) for n, each in enumerate(recordings()[:2])]
    good, bad = folder / "recordings.jsonl", folder / "damaged.jsonl"
    good.write_text("".join(lines))
    bad.write_text("".join(lines) + json.dumps({"question": "What is 1 + 1?"}) + "\n")
    (runs / "collected.jsonl").write_text("".join(lines))
    settings = load(
        upstream=vllm,
        store=store,
        store_text="full",
        record_fraction=1.0,
        record_branches=4,
        registry=registry.place,
        calibration=CHAMPION / "calibration.json",
        ui_runs=runs,
        **EMBEDDED,
    )
    async with running(settings) as url:
        sent = [await _ask(url, {"beta": beta, "controller": name}, number) for beta, name, number in SENT]
        for request_id in sent:
            await until_recorded(url, request_id)
        await _copy_to_yesterday(store)
        yield EmbeddedDashboard(url, store, registry, runs, good, bad, sent)


def _fill_registry(registry: Registry) -> None:
    """Make adaptive_consistency the champion, and let the candidate that beat it in the gate be the canary."""

    def cause(why: str, hours: int) -> ChangeCause:
        return ChangeCause("operator", why, datetime.now(UTC) - timedelta(hours=hours))

    promote_known(registry, "adaptive_consistency", RolloutStage.CHAMPION, 0.0, cause("first champion", 50))
    card = json.loads((CHAMPION / "champion.json").read_text())
    report = card["gate"][0]
    found = {"headline": report["headline"], "report": report, "discovery": card}
    spec = Spec(CANDIDATE, (CHAMPION / "champion.py").read_text())
    install(registry, spec, found, RolloutStage.CANARY, 0.1, cause("it passed the gate", 26))


async def _ask(url: str, tts: dict[str, Any], number: int) -> str:
    question = held_back(number + 1)[number].question
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "tts": tts}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/v1/chat/completions", json=body) as response:
        reply = await response.json()
        assert response.status == 200, reply
        return str(reply["id"])


async def _copy_to_yesterday(path: Path) -> None:
    """Add copies of the stored episodes, as if they had been served yesterday."""
    async with Store.open(path) as store:
        served = await store.episodes()
        copies = []
        for hour in range(24):
            name = f"chatcmpl-yesterday{hour}"
            created = datetime.now(UTC).replace(hour=hour, minute=7) - timedelta(days=1)
            episode = replace(served[hour % len(served)], id=name, request_id=name)
            copies.append(replace(episode, created=stored_time(created)))
        await store.add_all(copies)
