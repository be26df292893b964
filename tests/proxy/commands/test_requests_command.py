"""`autotts requests` and `autotts store info`: they show what a proxy has served and stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from discovery.store import Store
from proxy.admission import api_keys
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.recording.test_episode_log import ADMIN, call, serving
from tests.proxy.test_cli import autotts

pytestmark = pytest.mark.process


async def served(backend: FakeVLLM, path: Path) -> list[str]:
    """Serve three requests, give feedback on the second, and return their ids."""
    ids = []
    async with serving(backend, path) as proxy:
        for beta in ("0", "0.25", "0.5"):
            _, headers, _ = await proxy.ask(beta, tts={"answer": "boxed"})
            ids.append(headers["x-request-id"])
        for fields in ({"correct": False}, {"correct": True}, {"score": 0.5}):
            status, _ = await call(proxy, "POST", "/v1/tts/feedback", body={"request_id": ids[1], **fields})
            assert status in (200, 202)
    return ids


def listed(path: Path, *more: str) -> Any:
    return json.loads(autotts("requests", "list", "--store", str(path), "--json", *more).stdout)


async def test_requests_list_shows_the_latest_request_first(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    ids = await served(backend, path)
    rows = listed(path)
    assert [row["request"] for row in rows] == ids[::-1]
    assert [row["beta"] for row in rows] == [0.5, 0.25, 0]
    assert [row["feedback"] for row in rows] == [{}, {"correct": True, "score": 0.5}, {}]
    assert all(row["tokens"] > 0 and row["stop"] == "answered" and row["model"] == MODEL for row in rows)
    assert [row["request"] for row in listed(path, "--limit", "1")] == ids[2:]
    assert listed(path, "--model", "another") == []
    table = autotts("requests", "list", "--store", str(path)).stdout
    for row in rows:
        [line] = [line for line in table.splitlines() if row["request"] in line]
        assert row["created"][:19] in line
        assert row["controller"] in line
    assert "correct True" in table


async def test_a_piped_list_breaks_no_word_and_can_be_restricted_to_a_stop_reason(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    name = "n" * 120
    body = {"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0, "answer": "boxed"}}
    async with serving(backend, path) as proxy:
        for tts in ({"beta": 0, "answer": "boxed"}, {"beta": 1, "answer": "boxed", "max_total_tokens": 900}):
            sent, fields = {"x-request-id": name}, {**body, "tts": tts}
            async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=fields, headers=sent) as response:
                assert response.status == 200
    table = autotts("requests", "list", "--store", str(path)).stdout
    for row in listed(path):
        [line] = [line for line in table.splitlines() if row["request"] in line]
        for cell in (name, row["model"], row["controller"], row["stop"], row["created"][:19]):
            assert cell in line
    assert [row["stop"] for row in listed(path, "--stop", "max_tokens")] == ["max_tokens"]
    assert [row["stop"] for row in listed(path, "--stop", "answered")] == ["answered"]
    refused = autotts("requests", "list", "--store", str(path), "--stop", "anwsered")
    assert refused.returncode == 2
    assert "disconnected" in refused.stderr


async def test_requests_can_be_listed_by_key(backend: FakeVLLM, tmp_path: Path) -> None:
    path, keys = tmp_path / "s.db", tmp_path / "keys.toml"
    keys.write_text("\n".join(api_keys.key_file_entry(name, name) for name in ("alice", "bob")))
    body = {"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0, "answer": "boxed"}}
    async with serving(backend, path, keys=keys) as proxy:
        for name in ("alice", "bob", "alice"):
            assert (await call(proxy, "POST", "/v1/chat/completions", name, body))[0] == 200
    tenants = {key.name: key.tenant for key in api_keys.read_key_file(keys)}
    assert [row["tenant"] for row in listed(path)] == [tenants[name] for name in ("alice", "bob", "alice")]
    for beginning in (tenants["alice"], f"#{tenants['alice'][:8]}"):
        assert [row["tenant"] for row in listed(path, "--tenant", beginning)] == [tenants["alice"]] * 2
    table = autotts("requests", "list", "--store", str(path)).stdout
    assert f"#{tenants['bob'][:8]}" in table
    usage = json.loads(autotts("keys", "usage", str(keys), "--store", str(path), "--json").stdout)
    assert [(row["key"], row["requests"]) for row in usage["keys"]] == [("alice", 2), ("bob", 1)]


async def test_requests_that_only_record_branches_are_listed_with_all(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        for controller in ("everything@1", "everything", "asc@2"):
            body = {
                "messages": [{"role": "user", "content": "hi"}],
                "tts": {
                    "beta": 0,
                    "answer": "boxed",
                    "controller": controller,
                    "signals": controller == "everything",
                },
            }
            assert (await call(proxy, "POST", "/v1/chat/completions", ADMIN, body))[0] == 200
    assert [row["controller"] for row in listed(path)] == ["asc@2"]
    assert [row["signals"] for row in listed(path, "--all")] == [[], ["intervals", "probes"], []]
    assert [row["controller"] for row in listed(path, "--all")] == ["asc@2", "everything", "everything@1"]


@pytest.mark.parametrize("name", ["[/]", "[red]x[/red]", "a[42]"])
async def test_a_client_request_id_with_markup_is_listed_unchanged(
    backend: FakeVLLM, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        body = {"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0, "answer": "boxed"}}
        sent = {"x-request-id": name}
        async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=sent) as response:
            assert response.status == 200
    done = autotts("requests", "list", "--store", str(path))
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


async def test_store_info_shows_requests_and_feedback(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    await served(backend, path)
    info = json.loads(autotts("store", "info", "--store", str(path), "--json").stdout)
    assert (info["cells"], info["episodes"], info["stops"]) == ([], 3, {"answered": 3})
    assert info["feedback"] == {"correct": 2, "score": 1}
    assert info["oldest"] < info["newest"]
    shown = autotts("store", "info", "--store", str(path)).stdout
    assert "served requests: 3 from 20" in shown
    assert "feedback: correct: 2, score: 1" in shown


async def test_an_empty_store_is_reported_as_having_no_requests(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with Store.open(path, create=True):
        pass
    assert "served requests: none" in autotts("store", "info", "--store", str(path)).stdout
    assert "no requests" in autotts("requests", "list", "--store", str(path)).stdout
