"""Frontier page: points, bands, power and headers, from published and computed figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.ui.sources.frontier_points import (
    PUBLISHED,
    FrontierPoint,
    detectable_points,
    frontier_files,
    read_frontier,
)
from tests.proxy.ui.conftest import ALICE, Browser
from tests.proxy.ui.test_discovery import fake_job
from tests.proxy.ui.test_rendering import HOSTILE, Tags


def score(**changes: Any) -> dict[str, Any]:
    """Return a figure as `autotts evaluate --json` writes it."""
    figures = {
        "controller": "cmc", "digest": "d" * 64, "beta": 0.5, "tokens": 1000.0, "accuracy": 70.0, "error": 2.0,
        "critical_path_p95": 500.0, "model": "m1", "benchmark": "b", "split": "search", "questions": 400,
    }  # fmt: skip
    return {**figures, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with computed frontiers."""
    made = tmp_path / "runs"
    made.mkdir()
    scores = [score(), score(beta=1.0, tokens=4000.0), score(model="m2", controller=HOSTILE), score(controller="mine")]
    (made / "frontier.json").write_text(json.dumps(scores))
    (made / "broken-frontier.json").write_text("[{}]")
    return made


def charts(text: str) -> dict[str, Any]:
    """Return the descriptions of a page's charts by name."""
    described = (attributes.get("data-chart") for _, attributes in Tags(text).tags)
    return {chart["name"]: chart for chart in map(json.loads, filter(None, described))}


async def test_everybody_sees_the_published_frontier_with_its_power(local: Browser) -> None:
    page = await local.get("/ui/frontier")
    assert page.status == 200
    assert "400 questions are behind each point" in page.text
    assert "points</strong> of accuracy" in page.text
    shown = charts(page.text)
    assert shown["frontier"]["x"]["scale"] == "log"
    controllers = {series["name"]: series for series in shown["frontier"]["series"]}
    assert {"self_consistency", "cmc", "found_72111d2a"} <= controllers.keys()
    assert len(controllers["cmc"]["low"]) == len(controllers["cmc"]["points"]) == 5
    assert "x-tts-beta: 0.5" in controllers["cmc"]["values"][2]
    assert shown["path"]["title"] == "Accuracy over the critical path"


async def test_baselines_can_be_hidden(local: Browser) -> None:
    page = await local.get("/ui/frontier?baselines=off")
    assert "cmc" not in {series["name"] for series in charts(page.text)["frontier"]["series"]}


async def test_computed_frontiers_are_filtered_by_model(admin: Browser) -> None:
    page = await admin.get("/ui/frontier?source=frontier.json&model=m1")
    names = [series["name"] for series in charts(page.text)["frontier"]["series"]]
    assert names == ["cmc", "mine"]
    assert "<option selected>m1</option>" in page.text


async def test_hostile_names_are_inert(admin: Browser) -> None:
    page = await admin.get("/ui/frontier?source=frontier.json&model=m2")
    assert charts(page.text)["frontier"]["series"][0]["name"] == HOSTILE
    assert "<script>alert" not in page.text
    assert all((script.get("src") or "").startswith("/ui/static/") for script in Tags(page.text).executed)


async def test_a_file_that_is_no_frontier_is_named_with_a_remedy(admin: Browser) -> None:
    page = await admin.get("/ui/frontier?source=broken-frontier.json")
    assert page.status == 200
    assert "broken-frontier.json: not written by `autotts evaluate --json`" in page.text


async def test_clients_see_only_the_published_frontier(admin: Browser) -> None:
    client = Browser(admin.url)
    await client.sign_in(ALICE)
    assert (await client.get("/ui/frontier")).status == 200
    assert (await client.get("/ui/frontier?source=frontier.json")).status == 400
    assert (await client.post("/ui/frontier/compute")).status == 403
    assert (await client.post("/ui/frontier/stop")).status == 403
    assert "From your own recordings" not in (await client.get("/ui/frontier")).text
    await client.close()


async def test_without_a_folder_nothing_is_computed_and_the_page_says_why(local: Browser) -> None:
    assert "Set AUTOTTS_UI_RUNS to compute" in (await local.get("/ui/frontier")).text
    reply = await local.post("/ui/frontier/compute")
    assert reply.status == 400
    assert "AUTOTTS_UI_RUNS" in reply.text


@pytest.mark.process
async def test_an_admin_computes_a_frontier(
    admin: Browser, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_job(monkeypatch, tmp_path)
    assert (await admin.post("/ui/frontier/compute", {"split": "nonsense"})).status == 400
    assert (await admin.post("/ui/frontier/compute", {"labels": "nonsense"})).status == 400
    assert (await admin.post("/ui/frontier/compute", {"split": "search"})).status == 303
    arguments = await fake.started()
    assert arguments.startswith(f"evaluate --recordings {tmp_path / 's.db'} --controllers self_consistency,asc,")
    assert "--labels reference,feedback --split search" in arguments
    assert f"--json {folder / 'frontier.json'}" in arguments
    assert "Computing since" in (await admin.get("/ui/frontier")).text
    assert (await admin.post("/ui/frontier/stop")).status == 303
    await fake.ended()
    assert "Computing since" not in (await admin.get("/ui/frontier")).text


def test_a_file_outside_the_folder_is_not_listed(folder: Path) -> None:
    assert list(frontier_files(folder)) == [PUBLISHED, "broken-frontier.json", "frontier.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"points": [{}], "questions": 1}', '[{"accuracy": NaN}]', "null"])
def test_other_files_give_no_points(tmp_path: Path, text: str) -> None:
    path = tmp_path / "frontier.json"
    path.write_text(text)
    data = read_frontier("frontier.json", path)
    assert not data.points
    assert "write it again" in data.problem


def test_the_detectable_difference_shrinks_with_the_questions() -> None:
    def point(questions: int, half: float) -> FrontierPoint:
        return FrontierPoint("c", "d", 0.5, 100, 70, 70 - half, 70 + half, 10, "m", "b", "search", questions)

    few, many = detectable_points([point(100, 9.0)]), detectable_points([point(400, 4.5)])
    assert few is not None
    assert many is not None
    # a standard error of 4.59 points: sqrt(2) * 4.59 * (1.98 + 0.85) = 18.4
    assert few == pytest.approx(18.4, abs=0.2)
    assert many == pytest.approx(few / 2, rel=0.02)
    assert detectable_points([]) is None
    assert detectable_points([point(1, 9.0)]) is None
