"""Whether the upstream still is what recordings were made with: noticed, soon, and whatever is down meanwhile."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from tests.proxy.conftest import INTERVAL, SMALL, Proxy, backend
from tests.proxy.recording.test_branch_completion import VOTING, ended, recording, vote
from tests.proxy.recording.test_episode_log import call, recordings, serving, until

__all__ = ["backend"]  # a fixture


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.recording.template_drift.RETRY_S", 0.02)


@pytest_asyncio.fixture
async def path(backend: FakeVLLM, tmp_path: Path) -> Path:
    """A store with a recording."""
    async with recording(backend, tmp_path) as proxy:
        await vote(proxy, temperature=0)
        await ended(proxy, "recorded")
    return tmp_path / "s.db"


async def noticed(proxy: Proxy) -> float:
    found: float = await until(lambda: proxy.metric("autotts_recording_drift"))
    return found


async def test_another_chat_template_is_noticed(
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
    ("settings", "words"),
    [
        ({"branch_temperature": 0.3}, "branch temperature 'default' to '0.3'"),
        ({"probe_lead": "So \\boxed{"}, "probe template 'qwen3/2' to 'qwen3/2+"),
    ],
)
async def test_what_the_operator_sets_otherwise_is_noticed(
    backend: FakeVLLM, path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], words: str
) -> None:
    async with serving(backend, path, **settings) as proxy:
        assert await noticed(proxy) == 1
    assert words in caplog.text


async def test_a_model_by_another_name_is_noticed(
    backend: FakeVLLM, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.MODEL", "renamed")
    async with serving(backend, path) as proxy:
        assert await noticed(proxy) == 1
    assert f"renamed differs from its latest recordings (model '{MODEL}' to 'renamed')" in caplog.text


async def in_vain(caplog: pytest.LogCaptureFixture) -> None:
    async def told() -> bool:
        return "cannot compare chat templates" in caplog.text

    await until(told)


async def test_an_upstream_that_is_not_up_yet_is_looked_at_when_it_is(
    backend: FakeVLLM, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend.greeting, backend.fault = "<new>", "no_models"
    async with serving(backend, path) as proxy:
        await in_vain(caplog)
        backend.fault = ""
        assert await noticed(proxy) == 1


async def test_so_is_a_store(backend: FakeVLLM, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backend.greeting = "<new>"
    away = tmp_path / "away"
    async with serving(backend, away / "s.db", spill=tmp_path / "spill") as proxy:
        await in_vain(caplog)
        (tmp_path / "made").mkdir()
        path.rename(tmp_path / "made" / "s.db")  # noqa: ASYNC240
        (tmp_path / "made").rename(away)
        assert await noticed(proxy) == 1


async def test_a_store_that_is_yet_to_be_created_is_not_complained_of(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = load(upstream=backend.url, store=tmp_path / "s.db", **SMALL)
    async with upstream_session(settings) as session:
        drift = TemplateDrift(UpstreamClient(backend.url, session), settings, Metrics())
        assert not await drift._check()  # it is looked at again soon
        async with Store.open(tmp_path / "s.db", create=True):
            pass
        assert await drift._check()
    assert not [record for record in caplog.records if record.name == "proxy.recording.template_drift"]


async def test_an_upstream_that_has_failed_is_looked_at_again(backend: FakeVLLM, path: Path) -> None:
    async with serving(backend, path) as proxy:
        await until(lambda: _compared(proxy))
        backend.greeting, backend.fault = "<new>", "broken"
        for _ in range(5):
            await proxy.ask("0", tts=VOTING)
        assert await noticed(proxy) == 1  # long before the next look is due


async def _compared(proxy: Proxy) -> bool:
    async with proxy.http.get(f"{proxy.url}/metrics") as response:
        return "autotts_recording_drift{" in await response.text()


async def test_a_disk_that_fails_does_not_end_the_watch(
    backend: FakeVLLM, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, failures = Store.open, [OSError("the disk is gone")]

    @asynccontextmanager
    async def opened(path: Path, **given: Any) -> AsyncIterator[Store]:
        if failures and not given:  # the recorder gives some
            raise failures.pop()
        async with plain(path, **given) as store:
            yield store

    monkeypatch.setattr(Store, "open", opened)
    backend.greeting = "<new>"
    async with serving(backend, path) as proxy:
        assert await noticed(proxy) == 1
    assert not failures


async def test_one_text_completion_does_not_displace_chats(backend: FakeVLLM, tmp_path: Path) -> None:
    async with recording(backend, tmp_path) as proxy:
        for _ in range(3):
            await vote(proxy)
        await ended(proxy, "recorded", 3)
        body = {"model": MODEL, "prompt": f"<user>hi{ASSISTANT}", "tts": {"beta": 0, **VOTING}}
        assert (await call(proxy, "POST", "/v1/completions", body=body))[0] == 200
        await ended(proxy, "recorded", 4)
    found = await recordings(tmp_path / "s.db")
    assert len({one.version.upstream for one in found}) == 1
    assert len({one.version for one in found}) == 2

    class Known:
        def load(self, _: Cell) -> list[RecordedQuestion]:
            return [replace(one, reference="7") for one in found]

    scored = scorable_recordings(Known(), found[0].cell)  # type: ignore[arg-type]
    assert [("prompt" in one.sampling, len(one.branches)) for one in scored] == [(False, 12)]


async def test_a_prompt_that_is_asked_otherwise_than_chats_is_not_recorded(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.episode.plan.PROMPT_TAIL", 40)  # a token is a character here
    async with recording(backend, tmp_path) as proxy:
        prompt = f"<|start|>assistant{ASSISTANT}"  # as another family's chat template ends
        body = {"model": MODEL, "prompt": prompt, "tts": {"beta": 0, **VOTING}}
        assert (await call(proxy, "POST", "/v1/completions", body=body))[0] == 200
        chat = await vote(proxy)
        await ended(proxy, "recorded")
        assert await proxy.metric("autotts_recordings_total") == 1
    assert [one.request for one in await recordings(tmp_path / "s.db")] == [chat]
