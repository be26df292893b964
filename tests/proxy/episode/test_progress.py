"""Progress of an episode as objects in its stream: they add up to the bill, and stock clients ignore them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.fakes import MODEL, FakeVLLM
from tests.proxy.api.test_endpoints import PROMPT
from tests.proxy.conftest import Proxy
from tests.proxy.episode.test_whole_replies import served, text

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
ROUNDS = {"beta": 0.5, "controller": "parallel_probe", "progress": "rounds"}


async def streamed(proxy: Proxy, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream, without the last event."""
    async with proxy.http.post(proxy.url + path, json={"model": MODEL, "stream": True, **body}) as response:
        assert response.status == 200, await response.text()
        lines = [line[6:] for line in (await response.text()).splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def progress(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["tts"]["progress"] for chunk in chunks if "progress" in chunk.get("tts", {})]


async def test_rounds_say_what_happened_to_each_branch_and_add_up_to_the_bill(proxy: Proxy) -> None:
    chunks = await streamed(proxy, "/v1/chat/completions", messages=MESSAGES, tts=ROUNDS)
    rounds, tts = progress(chunks), chunks[-1]["tts"]
    assert [each["round"] for each in rounds] == list(range(1, tts["rounds"] + 1))
    changes = [change for each in rounds for change in each["changes"]]
    actions = Counter(change["action"] for change in changes)
    assert actions["open"] == rounds[-1]["branches"] == tts["branches"]
    assert actions["advance"] > 0
    assert actions["probe"] > 0
    spent = Counter[str]()
    for change in changes:
        spent["probe" if change["action"] == "probe" else "branches"] += change.get("tokens", 0)
    assert 0 < spent["probe"] <= tts["tokens"]["probe"], "the bill has the probes of the proxy itself too"
    assert spent["branches"] == sum(tts["tokens"][kind] for kind in ("winner", "agreeing", "losing", "pruned"))
    tokens = [each["tokens"] for each in rounds]
    assert tokens == sorted(tokens)
    ended = {change["branch"]: change["answer"] for change in changes if change.get("finished")}
    assert {vote["answer"]: vote["count"] for vote in rounds[-1]["votes"]} == Counter(ended.values()) == tts["votes"]


async def test_pruned_branches_are_reported_and_long_answers_are_clipped(proxy: Proxy) -> None:
    tts = {**ROUNDS, "beta": 1}
    rounds = progress(await streamed(proxy, "/v1/chat/completions", messages=MESSAGES, tts=tts))
    pruned = [change["branch"] for each in rounds for change in each["changes"] if change["action"] == "prune"]
    assert len(pruned) == len(set(pruned))
    finished = {c["branch"] for each in rounds for c in each["changes"] if c.get("finished")}
    assert rounds[-1]["running"] == rounds[-1]["branches"] - len(finished) - len(pruned)


async def test_long_answers_without_spaces_stay_apart(backend: FakeVLLM, proxy: Proxy) -> None:
    for number, chain in enumerate(backend.chains):
        answer = f"f({'x' * 60}) = {number % 2}"
        backend.chains[number] = chain.__class__(chain.text.replace("boxed{7}", f"boxed{{{answer}}}"), ())
    tts = {**ROUNDS, "controller": "self_consistency", "answer": "boxed"}
    rounds = progress(await streamed(proxy, "/v1/chat/completions", messages=MESSAGES, tts=tts))
    answers = [vote["answer"] for vote in rounds[-1]["votes"] if len(vote["answer"]) > 1]
    assert sorted(answer[-3:] for answer in answers) == ["= 0", "= 1"]
    assert all(answer.startswith("f(xxx") and len(answer) == 40 for answer in answers)


async def test_chunks_of_progress_have_no_choice_and_the_reply_is_the_same(proxy: Proxy) -> None:
    chunks = await streamed(proxy, "/v1/chat/completions", messages=MESSAGES, tts=ROUNDS)
    assert all(chunk["choices"] == [] for chunk in chunks if "progress" in chunk.get("tts", {}))
    stream = await proxy.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, extra_body={"tts": ROUNDS}
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(pieces) == "It is \\boxed{7}"


async def test_rounds_of_whole_replies_name_each_reply() -> None:
    async with served([text(each) for each in ("one", "two", "three")]) as proxy:
        tts = {"answer": "select", "controller": "self_consistency@3", "progress": "rounds", "beta": 0.5}
        chunks = await streamed(proxy, "/v1/chat/completions", messages=MESSAGES, tts=tts)
    rounds, bill = progress(chunks), chunks[-1]["tts"]["tokens"]
    changes = [change for each in rounds for change in each["changes"]]
    assert [change["action"] for change in changes] == ["open"] * 3
    assert all(change["finished"] for change in changes)
    assert sum(change["tokens"] for change in changes) == bill["winner"] + bill["agreeing"] + bill["losing"]
    assert {vote["answer"] for vote in rounds[-1]["votes"]} == {"reply 1", "reply 2", "reply 3"}


async def test_rounds_of_several_prompts_name_their_prompt(proxy: Proxy) -> None:
    chunks = await streamed(proxy, "/v1/completions", prompt=[PROMPT, PROMPT], tts=ROUNDS)
    prompts = {chunk["tts"]["prompt"] for chunk in chunks if "progress" in chunk.get("tts", {})}
    assert prompts == {0, 1}


@pytest.mark.parametrize(("value", "param"), [("round", "tts.progress"), (1, "tts.progress"), (None, "tts.progress")])
async def test_other_forms_of_progress_are_refused(proxy: Proxy, value: Any, param: str) -> None:
    status, _, reply = await proxy.ask(stream=True, tts={"progress": value})
    assert status == 400
    assert reply["error"]["param"].startswith(param)


async def test_responses_refuse_rounds_and_name_the_way_out(proxy: Proxy) -> None:
    body = {"model": MODEL, "input": "hi", "stream": True, "tts": ROUNDS}
    async with proxy.http.post(f"{proxy.url}/v1/responses", json=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "tts.progress")
    assert "use true" in error["message"]
