"""The page of a request replays its recorded branches under another controller, built-in or from a file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.promotion.registry import ChangeCause, Registry
from proxy.server import running
from proxy.settings import load
from proxy.ui.sources.replayable import load_replayable, replayable
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL
from tests.proxy.ui.conftest import Browser
from tests.proxy.ui.test_controllers import SOURCE
from tests.proxy.ui.test_pages import asked, until_shown


@pytest_asyncio.fixture
async def recording(backend: FakeVLLM, tmp_path: Path) -> AsyncIterator[Browser]:
    """Return a client of a proxy that completes the branches of every request."""
    settings = load(
        upstream=backend.url,
        store=tmp_path / "s.db",
        record_fraction=1.0,
        record_branches=8,
        store_text="full",
        **SMALL,
    )
    async with running(settings) as url:
        client = Browser(url)
        yield client
        await client.close()


async def test_recorded_branches_are_played_by_another_controller(recording: Browser) -> None:
    request_id = await asked(recording.url, tts={"beta": 0.5, "controller": "parallel_probe"})
    path = f"/ui/requests/{request_id}"
    await until_shown(recording, path, "branches were recorded to their ends")
    reply = await recording.get(f"{path}/what-if?controller=self_consistency&beta=1")
    assert reply.status == 200
    assert "self_consistency at β = 1" in reply.text
    assert "Votes: 7: " in reply.text
    for query, status in (
        ("controller=everything", 400),
        ("controller=x&beta=0.5", 400),
        ("controller=asc&beta=3", 400),
    ):
        assert (await recording.get(f"{path}/what-if?{query}")).status == status


@pytest.mark.process
async def test_recorded_branches_are_played_by_controllers_from_files_in_the_sandbox(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    spec = Spec("mine", SOURCE)
    cause = ChangeCause("tests", "", datetime(2026, 3, 1, tzinfo=UTC), forced=True)
    registry.install(spec, {"headline": "", "report": None}, RolloutStage.SHADOW, 0.0, cause)
    settings = load(
        upstream=backend.url, store=tmp_path / "s.db", registry=registry.place, record_fraction=1.0,
        record_branches=8, **SMALL,
    )  # fmt: skip
    async with running(settings) as url:
        client = Browser(url)
        request_id = await asked(url, tts={"beta": 0.5, "controller": "parallel_probe"})
        path = f"/ui/requests/{request_id}"
        page = await until_shown(client, path, "branches were recorded to their ends")
        assert f'<option value="{spec.digest}">mine ({spec.digest[:12]}), installed</option>' in page
        for value, name in ((spec.digest, "mine"), ("lockstep_lead", "lockstep_lead")):
            reply = await client.get(f"{path}/what-if?controller={value}&beta=1")
            assert reply.status == 200, reply.text
            assert f"{name} at β = 1" in reply.text
            assert "It stopped: answered" in reply.text
        await client.close()


def test_a_damaged_card_leaves_the_other_controllers(tmp_path: Path) -> None:
    spec, cause = Spec("mine", SOURCE), ChangeCause("tests", "", datetime(2026, 3, 1, tzinfo=UTC), forced=True)
    Registry(tmp_path).install(spec, {"headline": "", "report": None}, RolloutStage.SHADOW, 0.0, cause)
    (tmp_path / f"{'0' * 64}.json").write_text("{")
    assert {"cmc", "lockstep_lead"} <= replayable(None).keys()
    assert replayable(tmp_path).keys() == {*replayable(None), spec.digest}
    assert load_replayable(tmp_path, spec.digest) == spec
    assert load_replayable(tmp_path, "0" * 64) is None


async def test_branches_that_were_not_recorded_cannot_be_replayed(local: Browser) -> None:
    request_id = await asked(local.url)
    await until_shown(local, f"/ui/requests/{request_id}", "Why it stopped")
    reply = await local.get(f"/ui/requests/{request_id}/what-if?controller=asc&beta=1", headers={"hx-request": "true"})
    assert reply.status == 404
    assert "<html" not in reply.text
    assert "not recorded" in reply.text
