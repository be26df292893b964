"""Explorers: proposals of a model, an agent or a folder, their cost, and their confinement."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from pydantic import SecretStr, ValidationError

from controllers.advice import advise
from controllers.loading import LARGEST
from controllers.sandbox import seal
from discovery.errors import ExplorerError, HistoryError
from discovery.search.explorers import Candidate, Cost, Explorer, ExplorerContext, ScoredCandidate, confine, endpoint
from discovery.search.explorers import agent as agents
from discovery.search.explorers.agent import Agent
from discovery.search.explorers.endpoint import KEY, LLMSettings
from discovery.search.explorers.evolution import ratings
from discovery.search.explorers.files import Files
from discovery.search.explorers.llm import LLM, _read
from discovery.search.explorers.transcript import Transcript, exchange_key

SECRET = "sk-test-0123456789abcdef"
HEAD = "from controllers import *\nclass Mine:\n    def __init__(self, beta): pass\n"
GOOD = HEAD + "    def decide(self, state): return [answer(state.leader())] if state.width else [branch()]\n"
MALICIOUS = "import os\n" + GOOD
BROKEN = HEAD + "    def decide(self, state:\n"
PARENT = Candidate("base", GOOD + "# parent\n", "baseline")
CONTEXT = ExplorerContext(7, 3, [ScoredCandidate(PARENT, 50.0)])


# A scripted endpoint


def reply_with(source: str, note: str = "waves") -> str:
    """Return a reply in the requested format."""
    return f"NOTE: {note}\n\n```python\n{source}```\n"


def completion(content: str | None, usage: tuple[int, int] | None = (1000, 200)) -> dict[str, Any]:
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    body["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return body


Turn = dict[str, Any] | str | tuple[int, dict[str, str], Any]


class ScriptedEndpoint:
    """An OpenAI-compatible server that plays given turns: a body, `cut`, `hang`, `garbage`, or a status."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._release = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever)

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def close(self) -> None:
        """Stop the server; later connections are refused."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _close(self) -> None:
        self._release.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.keys.append(request.headers.get("authorization", ""))
        turn = self.turns.pop(0)
        if turn == "hang":
            await self._release.wait()
        if turn == "cut" and request.transport is not None:
            response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "999"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
            request.transport.abort()
            return response
        if isinstance(turn, str):
            return web.Response(text="{not json", content_type="application/json")
        status, headers, body = turn if isinstance(turn, tuple) else (200, {}, turn)
        return web.json_response(body, status=status, headers={"x-request-id": "r1", **headers})


@pytest.fixture
def server() -> Iterator[ScriptedEndpoint]:
    scripted = ScriptedEndpoint()
    scripted.start()
    yield scripted
    scripted.close()


class Waits:
    """A fake sleep that records the requested seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def settings(url: str, **changes: Any) -> LLMSettings:
    about: dict[str, Any] = {
        "models": {"m": 1},
        "prices": {"m": (3.0, 15.0)},
        "api_key": SecretStr(SECRET),
        "max_tokens": 4000,
        "timeout_s": 10,
    }
    return LLMSettings(base_url=url, **(about | changes))


def llm(
    server: ScriptedEndpoint, *turns: Turn, path: Path | None = None, waits: Waits | None = None, **changes: Any
) -> LLM:
    server.turns = list(turns)
    return LLM(settings(server.url, **changes), Transcript(path), waits or Waits())


def usd(prompt: int, completion: int) -> float:
    return (prompt * 3.0 + completion * 15.0) / 1e6


def test_each_explorer_has_its_name(tmp_path: Path, server: ScriptedEndpoint) -> None:
    explorers: list[Explorer] = [llm(server), Files(tmp_path), Agent(["true"], tmp_path)]
    assert [one.name for one in explorers] == ["llm", "files", "agent"]


# LLM


@pytest.mark.process
def test_a_valid_reply_becomes_a_candidate_with_its_cost(server: ScriptedEndpoint) -> None:
    (candidate,) = llm(server, completion(reply_with(GOOD))).propose(CONTEXT)
    assert candidate == Candidate(
        name="llm-0003",
        source=GOOD,
        explorer="llm",
        parent=PARENT.digest,
        note="waves",
        cost=Cost(1000, 200, usd(1000, 200)),
        genome={"model": "m", "calls": 1, "unknown": 0, "repaired": False},
    )
    (request,) = server.requests
    assert request["model"] == "m"
    assert (request["temperature"], request["max_tokens"]) == (1.0, 4000)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert "# parent" in request["messages"][1]["content"]
    assert server.keys == [f"Bearer {SECRET}"]


def test_settings_are_sent_in_the_request(server: ScriptedEndpoint) -> None:
    changes: dict[str, Any] = {
        "temperature": None,
        "limit": "max_completion_tokens",
        "extra": {"reasoning": {"effort": "low"}},
    }
    llm(server, completion(reply_with(GOOD)), **changes).propose(CONTEXT)
    (request,) = server.requests
    assert (request["max_completion_tokens"], request["reasoning"]) == (4000, {"effort": "low"})
    assert "temperature" not in request
    assert "max_tokens" not in request


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (reply_with(BROKEN), "SyntaxError"),
        (reply_with(MALICIOUS), "line 1: import os"),
        (reply_with(PARENT.source), "the file is identical to base, which was already tried"),
        ("I cannot do that.", "holds 0 ```python blocks"),
        (reply_with(GOOD) + reply_with(GOOD), "holds 2 ```python blocks"),
        (reply_with(GOOD).removesuffix("```\n"), "holds 0 ```python blocks"),
        (reply_with(GOOD + "#" * LARGEST + "\n"), f"more than {LARGEST} bytes"),
        (None, "holds 0 ```python blocks"),
    ],
    ids=["broken", "malicious", "duplicate", "none", "two", "cut off", "too long", "empty"],
)
def test_an_invalid_reply_is_repaired_once(server: ScriptedEndpoint, first: str | None, expected: str) -> None:
    explorer = llm(server, completion(first, (1000, 200)), completion(reply_with(GOOD, "mended"), (1300, 100)))
    (candidate,) = explorer.propose(CONTEXT)
    assert (candidate.source, candidate.note) == (GOOD, "mended")
    assert candidate.cost == Cost(2300, 300, usd(1000, 200) + usd(1300, 100))
    assert candidate.genome == {"model": "m", "calls": 2, "unknown": 0, "repaired": True}
    repair = server.requests[1]["messages"]
    assert [message["role"] for message in repair] == ["system", "user", "assistant", "user"]
    assert repair[2]["content"] == (first or "(nothing)")
    assert expected.replace("`", "'") in repair[3]["content"].replace("`", "'")


def test_a_reply_still_invalid_after_the_repair_is_proposed_unchanged(server: ScriptedEndpoint) -> None:
    (first,) = llm(server, completion(reply_with(MALICIOUS)), completion(reply_with(MALICIOUS))).propose(CONTEXT)
    assert first.source == MALICIOUS
    assert advise(first.source)
    assert len(server.requests) == 2
    (second,) = llm(server, completion("no"), completion("I will not.")).propose(CONTEXT)
    assert second.source == "I will not."
    assert second.cost.prompt_tokens == 2000


def test_thinking_blocks_and_odd_characters_in_a_reply_are_tolerated(server: ScriptedEndpoint) -> None:
    reply = f"<think>a draft\n{reply_with(BROKEN)}</think>\n" + reply_with(GOOD, "see `this` \ud800\u202e")
    (candidate,) = llm(server, completion(reply.replace("\n", "\r\n"))).propose(CONTEXT)
    assert (candidate.source, candidate.note) == (GOOD, "see 'this' ??")


def test_a_rate_limit_waits_the_requested_seconds_up_to_a_maximum(server: ScriptedEndpoint) -> None:
    waits = Waits()
    busy = {"error": {"message": "slow down"}}
    turns: list[Turn] = [(429, {"retry-after": "7"}, busy), (429, {"retry-after": "86400"}, busy), (429, {}, busy)]
    (candidate,) = llm(server, *turns, completion(reply_with(GOOD)), waits=waits).propose(CONTEXT)
    assert waits.seconds == [7, endpoint.LONGEST_WAIT_S, 4]
    assert candidate.genome["calls"] == 4
    assert (candidate.genome["unknown"], candidate.note) == (0, "waves")  # rate-limited calls cost nothing
    assert candidate.cost == Cost(1000, 200, usd(1000, 200))


@pytest.mark.parametrize("fault", ["cut", "garbage", "hang", "500", "error in a 200", "503 with usage"])
def test_a_failing_call_is_retried_and_its_unknown_cost_noted(server: ScriptedEndpoint, fault: str) -> None:
    usage = completion("", (50, 7))["usage"]
    turns: dict[str, Turn] = {
        "500": (500, {}, {"error": {"message": "oh"}}),
        "error in a 200": {"error": {"message": "upstream"}},
        "503 with usage": (503, {}, {"error": {"message": "oh"}, "usage": usage}),
    }
    waits = Waits()
    timeout = 0.2 if fault == "hang" else 10
    explorer = llm(server, turns.get(fault, fault), completion(reply_with(GOOD)), waits=waits, timeout_s=timeout)
    (candidate,) = explorer.propose(CONTEXT)
    assert waits.seconds == [1]
    assert candidate.source == GOOD
    if fault == "503 with usage":
        assert candidate.cost == Cost(1050, 207, usd(1000, 200) + usd(50, 7))
        assert (candidate.genome["unknown"], candidate.note) == (0, "waves")
    else:
        assert candidate.cost == Cost(1000, 200, usd(1000, 200))
        assert (candidate.genome["unknown"], candidate.note) == (1, "waves (1 of 2 calls of unknown cost)")


def test_a_reply_without_usage_is_noted_as_of_unknown_cost(server: ScriptedEndpoint) -> None:
    (candidate,) = llm(server, completion(reply_with(GOOD), None)).propose(CONTEXT)
    assert candidate.cost == Cost()
    assert candidate.genome["unknown"] == 1
    assert candidate.note == "waves (1 of 1 calls of unknown cost)"
    odd = completion(reply_with(GOOD)) | {"usage": {"prompt_tokens": "many", "completion_tokens": -1}}
    assert llm(server, odd).propose(CONTEXT)[0].genome["unknown"] == 1


def test_the_explorer_gives_up_after_its_retries_or_a_refusal(server: ScriptedEndpoint) -> None:
    waits = Waits()
    with pytest.raises(ExplorerError, match="m: the endpoint returned status 500, oh, after 3 calls"):
        llm(server, *[(500, {}, {"error": {"message": "oh"}})] * 3, waits=waits, retries=2).propose(CONTEXT)
    assert waits.seconds == [1, 2]
    with pytest.raises(ExplorerError, match="the endpoint returned status 404, no such model, after 1 calls"):
        llm(server, (404, {}, {"error": {"message": "no such model"}}), waits=waits).propose(CONTEXT)
    assert waits.seconds == [1, 2]  # a refused request is not retried
    server.close()
    with pytest.raises(ExplorerError, match="APIConnectionError"):
        llm(server, waits=waits, retries=0).propose(CONTEXT)


@pytest.mark.slow
def test_models_are_drawn_by_weight_from_the_context_seed(server: ScriptedEndpoint) -> None:
    prices = dict.fromkeys("abc", (1.0, 1.0))
    explorer = llm(server, models={"a": 3, "b": 1, "c": 0}, prices=prices)
    drawn = []
    for step in range(60):
        server.turns = [completion(reply_with(GOOD))]
        drawn.append(explorer.propose(replace(CONTEXT, step=step))[0].genome["model"])
    assert set(drawn) == {"a", "b"}
    assert 30 < drawn.count("a") < 57
    expected = [replace(CONTEXT, step=step).rng.choices(["a", "b", "c"], [3, 1, 0])[0] for step in range(60)]
    assert drawn == expected


def test_several_proposals_per_step_are_distinct_and_keep_what_succeeded(server: ScriptedEndpoint) -> None:
    turns = [completion(reply_with(GOOD)), completion(reply_with(GOOD)), completion(reply_with(GOOD + "# b\n"))]
    first, second = llm(server, *turns, proposals=2).propose(CONTEXT)
    assert (first.name, second.name) == ("llm-0003", "llm-0003-1")
    assert second.source == GOOD + "# b\n"  # the first attempt duplicated the other proposal
    assert (first.cost.prompt_tokens, second.cost.prompt_tokens) == (1000, 2000)
    refused: Turn = (401, {}, {"error": {"message": "no"}})
    assert len(llm(server, completion(reply_with(GOOD)), refused, proposals=3).propose(CONTEXT)) == 1


# Money


def test_a_call_whose_worst_case_exceeds_the_budget_is_not_made(server: ScriptedEndpoint) -> None:
    explorer = llm(server, completion(reply_with(GOOD)))
    explorer.propose(CONTEXT)
    request = server.requests[0]
    size = sum(len(message["content"].encode()) for message in request["messages"])
    most = settings(server.url).worst_case(request)
    assert most >= usd(size, 4000)
    with pytest.raises(ExplorerError, match=r"the budget is .* USD; up to 0\.0000 are spent, and one more call can"):
        llm(server, usd=most * 0.999).propose(CONTEXT)
    assert len(server.requests) == 1
    assert llm(server, completion(reply_with(GOOD)), usd=most).propose(CONTEXT)


def test_failed_calls_and_calls_of_unknown_cost_count_against_the_budget(
    server: ScriptedEndpoint, tmp_path: Path
) -> None:
    llm(server, completion(reply_with(GOOD))).propose(CONTEXT)
    most = settings(server.url).worst_case(server.requests[0])
    failing: Turn = (500, {}, {})
    for first, left in ((completion(reply_with(BROKEN)), usd(1000, 200)), (failing, most), ((429, {}, {}), 0.0)):
        path = tmp_path / f"{left}.jsonl"
        bound = most + left + (0.001 if first is not failing else 0) - 1e-9
        explorer = llm(server, first, completion(reply_with(GOOD)), path=path, usd=bound)
        if left == 0:
            assert explorer.propose(CONTEXT)
        else:
            if first is failing:
                with pytest.raises(ExplorerError, match="the budget is"):
                    explorer.propose(CONTEXT)
            else:  # the draft is kept if its repair cannot be paid
                (draft,) = explorer.propose(CONTEXT)
                assert (draft.source, draft.cost.usd, draft.genome["repaired"]) == (BROKEN, left, False)
            with pytest.raises(ExplorerError, match="the budget is"):  # a new process counts the spent calls
                llm(server, path=path, usd=bound).propose(replace(CONTEXT, step=99))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models"),
        ({"models": {"m": 0}}, "not all 0"),
        ({"models": {"m": -1, "n": 2}}, "weights must be at least 0"),
        ({"prices": {"m": (-1, 2)}}, "prices: must be at least 0"),
        ({"prices": {}, "usd": 1}, "a price for every model; prices are missing for m"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"modles": {}}, "modles"),
        ({"extra": {"n": 4}}, "extra: n must be 1"),
        ({"extra": {"best_of": 2}}, "extra: best_of must be 1"),
        ({"extra": {"max_completion_tokens": 10**6}}, "extra: max_completion_tokens is not allowed there"),
    ],
)
def test_invalid_settings_are_refused_without_showing_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as raised:
        LLMSettings(**({"base_url": "http://x/v1", "models": {"m": 1}, "api_key": SECRET} | changes))
    assert SECRET not in str(raised.value)


# Transcripts


def test_a_transcript_replays_a_run_without_key_or_endpoint(
    server: ScriptedEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calls.jsonl"
    turns: list[Turn] = [(429, {"retry-after": "9"}, {}), "cut", completion(reply_with(BROKEN)), "garbage"]
    turns += [completion(reply_with(GOOD), None), completion(reply_with(GOOD + "# 2\n"), (7, 8))]
    explorer = llm(server, *turns, path=path, proposals=2)
    made = explorer.propose(CONTEXT)
    assert [one.genome["calls"] for one in made] == [5, 1]
    assert path.read_text().count("\n") == len(server.requests) == 6
    server.close()

    def no_client(**_: object) -> None:
        raise AssertionError("a client was made")

    monkeypatch.setattr(openai, "OpenAI", no_client)
    waits = Waits()
    again = LLM(settings("http://127.0.0.1:9/v1", api_key=None, proposals=2), Transcript(path), waits)
    assert again.propose(CONTEXT) == made
    assert waits.seconds == []
    for other in (replace(CONTEXT, step=4), replace(CONTEXT, seed=8)):
        with pytest.raises(ExplorerError, match=f"{KEY} is not set, and the transcript does not hold this call"):
            again.propose(other)


def test_a_failed_step_is_retried_on_resume_and_keeps_its_earlier_calls(
    server: ScriptedEndpoint, tmp_path: Path
) -> None:
    path = tmp_path / "calls.jsonl"
    failing: Turn = (500, {}, {"error": {"message": "oh"}})
    tries: list[list[Turn]] = [[failing, failing], [failing, (401, {}, {})]]
    for turns in tries:
        with pytest.raises(ExplorerError):
            llm(server, *turns, path=path, retries=1).propose(CONTEXT)
    made = llm(server, failing, completion(reply_with(GOOD)), path=path, retries=1).propose(CONTEXT)
    assert (made[0].source, made[0].genome["calls"], made[0].genome["unknown"]) == (GOOD, 6, 4)
    assert llm(server, path=path, api_key=None).propose(CONTEXT) == made


def test_the_api_key_is_never_stored_logged_or_returned(
    server: ScriptedEndpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The key is in no transcript, candidate, error or log, even if the endpoint echoes it."""
    caplog.set_level("DEBUG")
    path = tmp_path / "calls.jsonl"
    echo: Turn = (429, {"retry-after": "0"}, {"error": {"message": f"key {SECRET}", SECRET: [SECRET]}})
    made = llm(server, echo, completion(reply_with(GOOD + f"# {SECRET}\n", SECRET)), path=path).propose(CONTEXT)
    assert made[0].note == "[key]"
    wrong: Turn = (401, {}, {"error": {"message": f"Incorrect API key provided: {SECRET}"}})
    with pytest.raises(ExplorerError, match=r"Incorrect API key provided: \[key\]") as raised:
        llm(server, wrong, path=path).propose(replace(CONTEXT, step=9))
    assert "POST" in caplog.text
    assert SECRET not in caplog.text
    named: Turn = (429, {"x-request-id": SECRET}, {})
    llm(server, named, completion(reply_with(GOOD)), path=path).propose(replace(CONTEXT, step=10))
    given = settings(server.url)
    for text in (path.read_text(), repr(made), str(raised.value), repr(given), given.model_dump_json()):
        assert SECRET not in text
    assert path.read_text().count("[key]") >= 5


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def given() -> SecretStr | None:
        return LLMSettings(base_url="http://x/v1", models={"m": 1}).api_key

    assert given() is None
    monkeypatch.setenv(KEY, SECRET)
    assert given() == SecretStr(SECRET)


def test_a_key_that_is_no_valid_header_value_is_refused(server: ScriptedEndpoint) -> None:
    for key in (SECRET + "\n", SECRET + "é"):
        with pytest.raises(ExplorerError, match="has characters that are not allowed") as raised:
            llm(server, api_key=SecretStr(key)).propose(CONTEXT)
        assert SECRET not in str(raised.value)
    assert server.requests == []


def test_a_short_dummy_key_that_occurs_in_a_source_is_not_redacted_there(server: ScriptedEndpoint) -> None:
    (candidate,) = llm(server, completion(reply_with(GOOD)), api_key=SecretStr("state")).propose(CONTEXT)
    assert candidate.source == GOOD


def test_a_transcript_ignores_a_torn_line_and_refuses_a_broken_one(tmp_path: Path) -> None:
    path, request = tmp_path / "calls.jsonl", {"model": "m"}
    first, second = (exchange_key(1, 2, call, request) for call in (0, 1))
    assert first != second
    assert len({exchange_key(*one, request) for one in ((1, 2, 0), (2, 1, 0), (1, 20, 0), (12, 0, 0))}) == 4
    Transcript(path).record(first, request, {"status": 200})
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"key": "half')
    transcript = Transcript(path)
    assert transcript.replay(first) == {"status": 200}
    assert transcript.replay(second) is None
    transcript.record(second, request, {"status": 500})
    assert [response for _, response in Transcript(path).exchanges()] == [{"status": 200}, {"status": 500}]
    path.write_bytes(b"nonsense\n" + complete)
    with pytest.raises(HistoryError, match="line 1 is not a recorded exchange"):
        Transcript(path)
    with pytest.raises(ExplorerError, match="no call is made without a transcript"):
        Transcript(tmp_path / "no" / "x").record(first, request, {})


# Files


def test_files_are_proposed_once_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(GOOD)
    (tmp_path / "a x.py").write_text(BROKEN)
    (tmp_path / "c.py").write_text(GOOD)  # a duplicate of b.py
    (tmp_path / "d.txt").write_text(GOOD)
    (tmp_path / "e.py").mkdir()
    made = Files(tmp_path).propose(CONTEXT)
    assert [(one.name, one.source, one.explorer) for one in made] == [("a_x", BROKEN, "files"), ("b", GOOD, "files")]
    known = replace(CONTEXT, standings=[ScoredCandidate(one, None) for one in made])
    assert Files(tmp_path).propose(known) == []
    (tmp_path / "a x.py").write_text(GOOD + "# now\n")
    assert [one.name for one in Files(tmp_path).propose(known)] == ["a_x"]


def test_unreadable_files_become_failing_candidates_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(GOOD + "#" * LARGEST)
    (tmp_path / "odd.py").write_bytes(b"# \xff\n" + GOOD.encode())
    (tmp_path / f"{'n' * 99}.py").write_text(GOOD)
    longest, named, odd = Files(tmp_path).propose(CONTEXT)
    assert (longest.name, len(named.name), odd.name) == ("long", 64, "odd")
    assert f"larger than {LARGEST} bytes" in longest.note
    assert "utf-8" in odd.note
    assert all(advise(one.source) for one in (longest, odd))
    with pytest.raises(ExplorerError, match="No such file"):
        Files(tmp_path / "gone").propose(CONTEXT)


def test_special_files_become_failing_candidates_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "zero.py").symlink_to("/dev/zero")
    (tmp_path / "nul.py").write_bytes(GOOD.encode() + b"\0")
    nul, pipe, zero = Files(tmp_path).propose(CONTEXT)
    assert pipe.note == "pipe.py: not a regular file; name a file that contains a controller"
    assert zero.note.startswith("zero.py: not a regular file")
    assert all(advise(one.source) for one in (nul, pipe, zero))


def test_a_reply_with_a_lone_surrogate_becomes_a_valid_candidate() -> None:
    draft = _read("NOTE: \ud83d\n```python\n" + GOOD + "# \ud83d\n```\n", {})
    assert Candidate("x", draft.source, "llm").digest
    assert draft.note == "?"
    assert draft.wrong == []


# Money spent before


def test_the_draft_and_its_cost_are_kept_if_its_repair_fails(server: ScriptedEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "exchanges.jsonl"
    made = llm(server, completion(reply_with(BROKEN)), (401, {}, {}), path=path).propose(CONTEXT)
    assert [(one.source, one.cost.usd) for one in made] == [(BROKEN, usd(1000, 200))]
    assert llm(server, path=path, api_key=None).propose(CONTEXT) == made


def test_a_repair_that_was_never_asked_for_is_made_when_the_run_is_resumed(
    server: ScriptedEndpoint, tmp_path: Path
) -> None:
    path = tmp_path / "exchanges.jsonl"
    llm(server, completion(reply_with(BROKEN)), completion(reply_with(GOOD)), path=path).propose(CONTEXT)
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(ExplorerError, match=f"{KEY} is not set"):
        llm(server, path=path, api_key=None).propose(CONTEXT)


def test_calls_of_a_model_without_a_price_are_refused_under_a_budget(server: ScriptedEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "exchanges.jsonl"
    llm(server, completion(reply_with(GOOD)), path=path).propose(CONTEXT)
    other: dict[str, Any] = {"models": {"other": 1}, "usd": 100}
    later = replace(CONTEXT, step=4)
    with pytest.raises(ExplorerError, match=r"the price of m is missing.*keep its price in `prices`"):
        llm(server, path=path, prices={"other": (1.0, 1.0)}, **other).propose(later)
    kept = {"other": (1.0, 1.0), "m": (3.0, 15.0)}
    assert llm(server, completion(reply_with(GOOD)), path=path, prices=kept, **other).propose(later)


def test_a_past_call_of_unknown_cost_counts_with_its_own_limit(server: ScriptedEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "exchanges.jsonl"
    llm(server, completion(reply_with(GOOD), None), path=path, max_tokens=100_000).propose(CONTEXT)
    with pytest.raises(ExplorerError, match=r"up to 1\.5\d* are spent"):
        llm(server, path=path, max_tokens=10, usd=1.5).propose(replace(CONTEXT, step=4))


# Agents

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux confines agents")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "workspaces"


def shell(root: Path, script: str, timeout_s: float = 30, **options: Any) -> Agent:
    return Agent(["/bin/sh", "-c", script], root, timeout_s, **options)


def log(root: Path, step: int = 3) -> str:
    return (root / f"step-{step:04d}" / "agent.log").read_text()


@pytest.mark.process
@linux
def test_the_workspace_of_an_agent_holds_the_task_standings_and_digests(root: Path, tmp_path: Path) -> None:
    search = tmp_path / "export.jsonl"
    search.write_text('{"anonymous": 1}\n')
    other = ScoredCandidate(Candidate("o/../x", GOOD + "# other\n", "llm", note="idea"), None, failure="it fell")
    context = replace(CONTEXT, standings=[*CONTEXT.standings, other], digests={PARENT.digest: "had it `` lost it"})
    script = f"printf '%s' '{GOOD}' > {{workspace}}/candidate.py; echo 'all `new`' > NOTE.txt; test -w $TMPDIR; pwd"
    (candidate,) = shell(root, script, search=search).propose(context)
    assert candidate.cost.seconds > 0
    assert (candidate.name, candidate.source, candidate.explorer, candidate.note) == (
        "agent-0003",
        GOOD,
        "agent",
        "all 'new'",
    )
    assert candidate.parent == PARENT.digest
    workspace = root / "step-0003"
    assert log(root) == f"{workspace}\n"
    assert sorted(str(path.relative_to(workspace)) for path in workspace.rglob("*") if path.is_file()) == [
        *("API.md", "CONSTRAINTS.md", "LEADERBOARD.md", "NOTE.txt", "TASK.md", "agent.log", "candidate.py"),
        *("digests/0000-base.md", "history/0000-base.py", "history/0001-o____x.py", "search.jsonl"),
    ]
    assert "search.jsonl" in (workspace / "TASK.md").read_text()
    assert (workspace / "search.jsonl").read_bytes() == search.read_bytes()
    assert (workspace / "history" / "0000-base.py").read_text() == PARENT.source
    assert (workspace / "digests" / "0000-base.md").read_text() == "had it '' lost it\n"
    board = (workspace / "LEADERBOARD.md").read_text()
    assert "50.00  base" in board
    assert "it fell" in board
    assert "confidence(first, second)" in (workspace / "API.md").read_text()
    assert "AFS" in (workspace / "CONSTRAINTS.md").read_text()


@pytest.mark.process
@linux
@pytest.mark.parametrize(
    "deed",
    [
        *("cat {store}", "ls {outside}", "cp {store} .", "mv {store} x", "ln {store} x", "rm {store}"),
        *("echo x >> {store}", "truncate -s 0 {store}", "touch {outside}/new", "mkdir {outside}/new"),
        *("ln -s {store} link && cat link", "cat /proc/{pid}/environ", "cat /proc/{pid}/root{store}", "kill -0 {pid}"),
        *("mount -t tmpfs none tmp", "mknod x c 1 3", "cat /etc/shadow", "echo x > /usr/x"),
    ],
)
def test_an_agent_reaches_nothing_outside_its_workspace_even_as_root(root: Path, tmp_path: Path, deed: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    store = outside / "held-out.db"
    store.write_text("the secret")
    deed = deed.format(store=store, outside=outside, pid=os.getpid())
    with pytest.raises(ExplorerError, match=r"the agent ended with status 0 without a readable candidate\.py"):
        shell(root, f"{deed} && echo it went || echo it did not").propose(CONTEXT)
    output = log(root)
    assert "it did not" in output
    assert "the secret" not in output
    assert store.read_text() == "the secret"
    assert list(outside.iterdir()) == [store]


@pytest.mark.process
@linux
def test_an_agent_may_use_its_workspace_and_read_readable_folders(root: Path, tmp_path: Path) -> None:
    """The commands refused above succeed inside the workspace, and reading succeeds in a readable folder."""
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "given").write_text("a gift\n")
    script = (
        f"set -e; cat {extra}/given; echo 1 > a; cp a b; mv b c; ln c d; rm d; echo x >> c; truncate -s 0 c; mkdir e; "
        f"ln -s a f; cat f; kill -0 $$; echo > /dev/null; python -c 'print(6 * 7)'; echo '# all' > candidate.py; "
        f"touch {extra}/new"
    )
    assert shell(root, script, readable=[extra]).propose(CONTEXT)[0].source == "# all\n"
    assert log(root).splitlines()[:3] == ["a gift", "1", "42"]
    assert "Permission denied" in log(root).splitlines()[3]


@pytest.mark.process
@linux
def test_an_agent_reads_certificates_but_no_private_keys(root: Path) -> None:
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if not bundle.exists():
        pytest.skip(f"{bundle} does not exist")
    script = (
        f"head -c 9 {bundle} >/dev/null && echo bundle; ls /etc/ssl/private || echo refused; echo '# x' > candidate.py"
    )
    shell(root, script).propose(CONTEXT)
    output = log(root).splitlines()
    assert (output[0], output[-1]) == ("bundle", "refused")
    assert Path("/etc/ssl") not in map(Path, confine.READABLE)


@pytest.mark.process
@linux
def test_an_agent_has_no_privileges_and_a_clean_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setenv("AGENT_KEY", "for the agent")
    script = "env | cut -d= -f1; echo > candidate.py; exec grep -hE 'Cap(Prm|Eff)|NoNewPrivs' /proc/self/status"
    shell(root, script, variables=["AGENT_KEY", "NOT_THERE"]).propose(CONTEXT)
    names, _, status = log(root).partition("CapPrm:")
    assert set(names.split()) - {"PWD", "OLDPWD", "SHLVL", "_"} == {"AGENT_KEY", "HOME", "LANG", "PATH", "TMPDIR"}
    assert status.split() == ["0" * 16, "CapEff:", "0" * 16, "NoNewPrivs:", "1"]
    assert SECRET not in log(root)


@pytest.mark.process
@linux
def test_an_agent_is_killed_at_its_timeout_with_its_children(root: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ExplorerError, match=r"the agent was killed after 0\.5 s without a readable candidate\.py"):
        shell(root, "sleep 300 & echo $!; echo $$; sleep 300", timeout_s=0.5).propose(CONTEXT)
    assert time.monotonic() - began < 20
    assert all(_is_gone(int(line)) for line in log(root).split())
    assert len(log(root).split()) == 2


@pytest.mark.process
@linux
def test_processes_an_agent_leaves_behind_end_with_it(root: Path) -> None:
    (candidate,) = shell(root, "sleep 300 & echo $!; echo '# here' > candidate.py").propose(CONTEXT)
    assert candidate.source == "# here\n"
    assert _is_gone(int(log(root)))


def _is_gone(process: int, patience_s: float = 5) -> bool:
    """Return whether a process has ended; a zombie counts as ended."""
    ends = time.monotonic() + patience_s
    while time.monotonic() < ends:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.process
@linux
@pytest.mark.parametrize(
    "trick", ["ln -s {secret}", "mkfifo", "mkdir", "head -c 70000 /dev/zero >", "printf '\\377' >"]
)
def test_a_candidate_that_is_not_a_readable_regular_file_is_refused(root: Path, tmp_path: Path, trick: str) -> None:
    secret = tmp_path / "secret.py"
    secret.write_text(GOOD)
    with pytest.raises(ExplorerError, match=r"without a readable candidate\.py"):
        shell(root, f"{trick.format(secret=secret)} candidate.py").propose(CONTEXT)


@pytest.mark.process
@linux
def test_a_workspace_left_by_an_earlier_run_is_replaced(root: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    shell(root, f"ln -s {tmp_path}/kept link; ln -s {tmp_path} folder; echo > candidate.py").propose(CONTEXT)
    with pytest.raises(ExplorerError, match=r"without a readable candidate\.py"):
        shell(root, "ls").propose(CONTEXT)
    assert "candidate.py" not in log(root)
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.process
@linux
def test_a_missing_command_or_search_file_is_reported(root: Path) -> None:
    with pytest.raises(ExplorerError, match=r"was not started, because it cannot be confined: .*No such file"):
        Agent(["no-such-command"], root).propose(CONTEXT)
    with pytest.raises(ExplorerError, match="the agent's workspace"):
        Agent(["true"], root, search=root / "gone").propose(CONTEXT)


def test_without_landlock_no_agent_is_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(agents, "version", missing)
    with pytest.raises(
        ExplorerError, match=r"was not started, because this system cannot confine it to its workspace: .*implemented"
    ):
        shell(root, "echo > candidate.py").propose(CONTEXT)
    assert not root.exists()


@pytest.mark.process
@linux
@pytest.mark.parametrize("name", ["_LANDLOCK_CREATE", "_LANDLOCK_RESTRICT", "_NO_NEW_PRIVS"])
def test_a_launcher_that_cannot_confine_does_not_start_the_command(tmp_path: Path, name: str) -> None:
    """Each system call the launcher needs is replaced by a number that no kernel has."""
    code = f"""
import sys
from controllers.sandbox import seal
from discovery.search.explorers import confine
seal.{name} = 4321
confine.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, str(tmp_path), "--", "/bin/sh", "-c", "echo > candidate.py"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == confine.REFUSED
    assert ended.stderr.startswith("cannot run confined: ")
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_landlock_version_below_the_minimum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Callable[..., int] = lambda *_: confine.OLDEST - 1  # noqa: E731
    monkeypatch.setattr(seal, "_call", old)
    with pytest.raises(OSError, match="Landlock version 2 is too old"):
        confine.version()


@pytest.mark.process
@linux
@pytest.mark.parametrize("arguments", ["", "w", "-- x", "w --", "w --read -- x", "w y z -- x"])
def test_a_launcher_with_invalid_arguments_exits_with_refused(arguments: str) -> None:
    command = [sys.executable, "-m", "discovery.search.explorers.confine", *arguments.split()]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == confine.REFUSED


# Ratings for explorers that learn from earlier candidates


def test_ratings_rank_scores_above_estimates_and_failures_last() -> None:
    def standing(name: str, score: float | None, estimate: float | None) -> ScoredCandidate:
        return ScoredCandidate(Candidate(name, f"# {name}\n", "grammar"), score, estimate=estimate)

    standings = [
        standing("best", 50.0, 52.0),
        standing("scored", 49.5, 51.5),
        standing("dropped", None, 49.0),
        standing("dropped early", None, 40.0),
        standing("failed", None, None),
        standing("hardly dropped", None, 51.9),
        standing("nearly as good", None, 51.8),
    ]
    rated = ratings(standings)
    in_order = [rated[one.candidate.digest] for one in standings]
    assert in_order == pytest.approx([50.0, 49.5, 45.6, 36.6, 35.6, 48.5, 48.4])


def test_ratings_without_scores_are_the_estimates() -> None:
    dropped = ScoredCandidate(Candidate("a", "# a\n", "grammar"), None, estimate=-7.0)
    failed = ScoredCandidate(Candidate("b", "# b\n", "grammar"), None)
    assert list(ratings([dropped, failed]).values()) == [-7.0, -8.0]
    assert list(ratings([failed]).values()) == [-1.0]
