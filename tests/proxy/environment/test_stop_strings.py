"""Clients' stop strings end the reply. They do not affect the thought or the votes."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from deploy.embedded.task import held_back
from proxy.environment.stop_strings import MAX_AT_SERVER, OPENING_TOKENS, StopStrings
from proxy.probe_templates import TEMPLATES, Family
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.fakes import Chain
from tests.proxy.conftest import INTERVAL, Proxy

HARNESSES = {
    "equals sign": ["="],
    "line": ["\n"],
    "lm-eval gsm8k": ["Question:", "</s>", "<|im_end|>"],
    "lm-eval gsm8k_cot": ["Q:", "</s>", "<|im_end|>"],
    "lm-eval minerva_math": ["Problem:"],
    "lm-eval default": ["\n\n"],
    "LangChain ReAct": ["\nObservation:", "\n\tObservation:"],
    "LangChain chat": ["\nHuman:", "\nAI:"],
    "more than vLLM takes": ["Question:", "Q:", "\n\n", "</s>", "<|im_end|>", "Human:"],
}


@pytest.mark.parametrize(
    ("family", "tail", "text", "begin"),
    [
        (Family.QWEN3, "", "", None),
        (Family.QWEN3, "", "\n<thi", None),
        (Family.QWEN3, "", "<think>1 = 1", None),
        (Family.QWEN3, "", "<think>1</think>\n\n", None),
        (Family.QWEN3, "", "<think>1</think>\n\nSo", 18),
        (Family.QWEN3, "", "So", 0),
        (Family.QWEN3, "<think>\n", "", None),
        (Family.QWEN3, "<think>\n", "So</think>1", 10),
        (Family.GPT_OSS, "", "So", None),
        (Family.PLAIN, "", "", 0),
        (Family.PLAIN, "", "<think>", 0),
    ],
)
def test_where_the_reply_begins(family: Family, tail: str, text: str, begin: int | None) -> None:
    assert TEMPLATES[family].reply_at(tail, text) == begin


def test_stop_strings_are_sent_to_the_server_once_the_reply_has_begun() -> None:
    stops = StopStrings(["=", "\n"], TEMPLATES[Family.QWEN3], "")
    assert (stops.at_server(""), stops.max_tokens("", 100, 500)) == ([], OPENING_TOKENS)
    assert (stops.at_server("<think>1 ="), stops.max_tokens("<think>1 =", 100, 500)) == ([], 100)
    assert (stops.at_server("So"), stops.max_tokens("So", 100, 500)) == (["=", "\n"], 500)
    many = StopStrings(["="] * (MAX_AT_SERVER + 1), TEMPLATES[Family.QWEN3], "")
    assert (many.at_server("So"), many.max_tokens("So", 100, 500)) == ([], 100)
    none = StopStrings([], TEMPLATES[Family.QWEN3], "")
    assert (none.at_server("So"), none.max_tokens("", 100, 500), none.cut("So = 1")) == ([], 500, None)


@pytest.mark.parametrize("known", range(30))
def test_a_stop_string_is_found_wherever_the_text_was_divided(known: int) -> None:
    text = "<think>a ## b</think>\n\nSo 4 ## c"
    stops = StopStrings(["##"], TEMPLATES[Family.QWEN3], "")
    assert stops.cut(text, known if known <= text.rindex("##") + 1 else 0) == text.rindex("##")
    assert stops.cut(text[:-5]) is None
    assert stops.trim("So 4 ## c") == "So 4 "


def thinking(reply: str, length: int = 90, mark: str = "a") -> Chain:
    return Chain("<think>x = 1\n\n" + mark * length + "</think>\n\n" + reply, ("7",))


@pytest.mark.parametrize("controller", ["cmc", "self_consistency", "parallel_probe"])
@pytest.mark.parametrize("stop", [["="], ["\n"], ["\n\n", "y"], ["1", "2", "3", "4", "5", "a"]])
async def test_stop_strings_do_not_end_a_thought(proxy: Proxy, stop: list[str], controller: str) -> None:
    proxy.backend.chains = [thinking("It is \\boxed{7}", mark=mark) for mark in "abcdefgh"]
    _, headers, reply = await proxy.ask("0", stop=stop, tts={"controller": controller})
    message = reply["choices"][0]["message"]
    assert headers["x-tts-stop"] == "answered"
    assert message["content"] == "It is \\boxed{7}"
    assert set(reply["tts"]["votes"]) <= {"7"}
    assert reply["tts"]["answer"] == "7"
    assert "x = 1" in message["reasoning"]
    assert reply["tts"]["tokens"]["total"] == sum(v for k, v in reply["tts"]["tokens"].items() if k != "total")


@pytest.mark.parametrize("interval_part", [0, 3, 7])
async def test_a_reply_ends_at_its_first_stop_string_and_the_answer_before_it_counts(
    proxy: Proxy, interval_part: int
) -> None:
    chain = thinking("It is \\boxed{7} STOP " + "more " * 100, INTERVAL + interval_part)
    proxy.backend.chains = [chain]
    _, _, reply = await proxy.ask("0", stop="STOP", tts={"controller": "self_consistency"})
    assert reply["choices"][0]["message"]["content"] == "It is \\boxed{7} "
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["tts"]["answer"] == "7"
    assert reply["tts"]["votes"]["7"] == reply["tts"]["branches"]


@pytest.mark.parametrize("answer", [None, "boxed"])
async def test_a_reply_cut_before_its_answer_is_probed(proxy: Proxy, answer: str | None) -> None:
    proxy.backend.chains = [thinking("We find 3 + 4 = 7", mark=mark) for mark in "abcdefgh"]
    tts: dict[str, Any] = {"controller": "self_consistency"} | ({"answer": answer} if answer else {})
    _, headers, reply = await proxy.ask("0.3", stop=["="], tts=tts)
    assert headers["x-tts-stop"] == "answered"
    assert reply["choices"][0]["message"]["content"] == "We find 3 + 4 "
    assert reply["tts"]["votes"] == {"7": reply["tts"]["branches"]}
    assert reply["tts"]["agreed"] is True
    assert reply["tts"]["tokens"]["probe"] > 0
    assert reply["tts"]["tokens"]["total"] == sum(v for k, v in reply["tts"]["tokens"].items() if k != "total")


async def test_a_reply_cut_within_its_answer_still_agrees_with_its_own_vote(proxy: Proxy) -> None:
    proxy.backend.chains = [thinking("It is \\boxed{7}", mark=mark) for mark in "abcdefgh"]
    _, _, reply = await proxy.ask("0.3", stop=["}"], tts={"controller": "self_consistency"})
    assert reply["choices"][0]["message"]["content"] == "It is \\boxed{7"
    assert (reply["tts"]["answer"], reply["tts"]["agreed"]) == ("7", True)


async def test_max_total_tokens_holds_though_cut_replies_are_probed(proxy: Proxy) -> None:
    proxy.backend.chains = [thinking("We find 3 + 4 = 7", mark=mark) for mark in "abcdefgh"]
    for cap in (450, 800, 2000):
        tts = {"controller": "self_consistency", "answer": "boxed", "max_total_tokens": cap}
        status, _, reply = await proxy.ask("1", stop=["="], tts=tts)
        assert status == 200, reply
        assert reply["tts"]["tokens"]["total"] <= cap


async def test_without_a_thought_the_server_gets_the_stop_strings(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain(mark + " It is \\boxed{7}." + "b" * 300, ("7",)) for mark in "abcdefgh"]
    await proxy.ask("0", stop=["\n"], tts={"controller": "self_consistency", "answer": "boxed"})
    sent = [(request.get("stop"), request["max_tokens"]) for request in proxy.backend.requests]
    assert sent[0] == (None, OPENING_TOKENS)
    assert sent[1][0] == ["\n"]


@pytest.mark.vllm
@pytest.mark.parametrize("stop", HARNESSES.values(), ids=HARNESSES)
async def test_common_stop_strings_lose_no_votes_on_vllm(vllm: str, stop: list[str]) -> None:
    async with running(load(upstream=vllm, **EMBEDDED)) as url, aiohttp.ClientSession() as http:
        for beta, controller, stream in ((0, "cmc", False), (0.3, "self_consistency", False), (0.3, "cmc", True)):
            body = {
                "messages": [{"role": "user", "content": held_back(2)[1].question}],
                "stop": stop,
                "stream": stream,
                "seed": 5,
                "tts": {"beta": beta, "controller": controller},
            }
            async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                text = await response.text()
            assert response.status == 200, text
            if stream:
                chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
                reply = chunks[-1]
                content = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
            else:
                reply = json.loads(text)
                content = reply["choices"][0]["message"]["content"]
            assert reply["tts"]["stop"] == "answered"
            assert reply["tts"]["answer"] is not None
            assert f"\\boxed{{{reply['tts']['answer']}}}" in content
            assert sum(reply["tts"]["votes"].values()) >= 1
