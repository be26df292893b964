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
    backend.models = ["autotts-tiny"]
    monkeypatch.setattr("proxy.commands.demo.SETTINGS", [*demo.SETTINGS[:2], demo.SETTINGS[3]])
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


def answered(rights: list[bool], tokens: int) -> list[demo.AnsweredRequest]:
    return [demo.AnsweredRequest(right, tokens, 1, 0.1) for right in rights]


def rows_of(vote: list[bool], by_beta: list[list[bool]]) -> dict[demo.DemoSetting, list[demo.AnsweredRequest]]:
    settings = [demo.DemoSetting(f"β = {number}", float(number), None) for number in range(len(by_beta))]
    rows = {demo.DemoSetting(f"SC@{demo.VOTERS}", 1.0, "self_consistency@32"): answered(vote, 1000)}
    tokens = [100 * (1 + number) for number in range(len(by_beta))]
    return rows | {s: answered(rights, t) for s, rights, t in zip(settings, by_beta, tokens, strict=True)}


def test_the_share_of_tokens_that_buys_the_accuracy_of_the_vote_is_interpolated() -> None:
    half, most, every = [True, False] * 10, [True, True, True, False] * 5, [True] * 20
    (line,) = demo.comparison(rows_of(most, [half, every]))
    assert line == "The accuracy of SC@32 (75.0 %) takes 15 % of its tokens."


def test_a_vote_that_is_not_reached_is_said_so() -> None:
    half, most = [True, False] * 10, [True, True, True, False] * 5
    (line,) = demo.comparison(rows_of(most, [half, half]))
    assert line == ("The accuracy of SC@32 (75.0 %) is not reached; β = 1 has 50.0 % for 20 % of its tokens.")


def test_only_a_loss_beyond_chance_is_reported() -> None:
    every, half = [True] * 20, [True, False] * 10
    almost = [False, *[True] * 19]
    assert not any("falls" in line for line in demo.comparison(rows_of(half, [every, almost])))
    assert "Accuracy falls from β = 0 to β = 1 by more than chance." in demo.comparison(rows_of(half, [every, half]))
