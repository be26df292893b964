"""The demo asks every problem in every row, greedy decoding and a single sample among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.commands import demo
from proxy.server import running
from proxy.settings import load
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL


async def test_the_demo_table_has_rows_for_greedy_decoding_a_single_sample_and_each_beta(
    backend: FakeVLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.MODEL", "autotts-tiny")
    monkeypatch.setattr("proxy.commands.demo.SETTINGS", demo.SETTINGS[:3])
    async with running(load(upstream=backend.url, **SMALL)) as url:
        await demo.run(f"{url}/v1", 2, tmp_path / "frontier.svg")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("│")[1:] for line in lines if "│" in line]
    assert [row[0].strip() for row in rows] == ["greedy", "single sample", "β = 0"]
    assert [row[3].strip() for row in rows[:2]] == ["1.0", "1.0"]  # branches
    assert (tmp_path / "frontier.svg").exists()
    temperatures = [r.get("temperature") for r in backend.requests if "include_stop_str_in_output" not in r]
    assert temperatures.count(0) >= 2
    assert set(temperatures) == {0, None}
