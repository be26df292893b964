"""Token limits that truncate every branch cost one branch, and the reply reports them."""

from __future__ import annotations

import pytest

from tests.fakes import Chain, chain
from tests.proxy.conftest import INTERVAL, SERVED, Proxy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("answer", [None, "boxed", "json"])
@pytest.mark.parametrize("controller", SERVED)
@pytest.mark.parametrize("limit", [1, 16, INTERVAL])
async def test_a_limit_too_short_for_an_answer_costs_one_branch(
    proxy: Proxy, limit: int, controller: str, answer: str | None
) -> None:
    tts = {"controller": controller} | ({} if answer is None else {"answer": answer})
    status, headers, reply = await proxy.ask("0.5", max_tokens=limit, tts=tts)
    assert status == 200, reply
    assert proxy.backend.opened == 1
    assert proxy.backend.generated == reply["usage"]["completion_tokens"] == limit
    assert headers["x-tts-stop"] == "max_tokens"
    assert (reply["tts"]["agreed"], reply["tts"]["answer"], reply["tts"]["votes"]) == (None, None, {})
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "length"
    written = (choice["message"].get("reasoning") or "") + (choice["message"]["content"] or "")
    assert written.strip("<think>") == proxy.backend.chains[0].text[:limit].strip("<think>")


async def test_a_limit_just_long_enough_for_the_first_branch_lets_all_vote(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("It is \\boxed{7}", ("7",)), Chain("So it is \\boxed{7}", ("7",))]
    _, headers, reply = await proxy.ask("0.5", max_tokens=INTERVAL, tts={"controller": "self_consistency"})
    assert headers["x-tts-stop"] == "answered"
    assert reply["tts"]["votes"]["7"] == reply["tts"]["branches"] > 2
    assert reply["tts"]["agreed"] is True


async def test_a_longer_limit_that_truncates_the_first_branch_opens_no_more(proxy: Proxy) -> None:
    proxy.backend.chains = [chain("7", 400, [""], mark=mark) for mark in "abcdefgh"]
    limit = 3 * INTERVAL
    _, headers, reply = await proxy.ask("0.5", max_tokens=limit, tts={"controller": "self_consistency"})
    assert headers["x-tts-stop"] == "max_tokens"
    assert proxy.backend.opened == reply["tts"]["branches"] == 1
    assert reply["usage"]["completion_tokens"] <= limit + 10
    assert reply["tts"]["agreed"] is None


@pytest.mark.parametrize(("controller", "wave"), [("adaptive_consistency", 8), ("asc", 8), ("mars", 64)])
@pytest.mark.parametrize("answer", [None, "boxed"])
async def test_a_limit_that_truncates_the_first_wave_opens_no_second(
    proxy: Proxy, controller: str, wave: int, answer: str | None
) -> None:
    proxy.backend.chains = [chain("7", 400, ["7"], mark=chr(97 + i % 26)) for i in range(64)]
    tts = {"controller": controller} | ({} if answer is None else {"answer": answer})
    question = [{"role": "user", "content": "What is 3 + 4?"}]  # a probe of the first branch gives an answer
    status, headers, reply = await proxy.ask("0.5", messages=question, max_tokens=3 * INTERVAL, tts=tts)
    assert (status, headers["x-tts-stop"], reply["tts"]["votes"]) == (200, "max_tokens", {})
    assert proxy.backend.opened == reply["tts"]["branches"] <= wave


@pytest.mark.parametrize("unanswered", [1, 2])
async def test_up_to_two_replies_without_an_answer_do_not_vote_and_the_others_do(proxy: Proxy, unanswered: int) -> None:
    texts = ["I cannot tell what it is", "It is what it is"][:unanswered]
    texts += [*(f"The answer is \\boxed{{7}}{'.' * i}" for i in range(20))]
    proxy.backend.chains = [
        Chain(f"<think>1 + 1 = {chr(97 + i) * (60 + i)}</think>\n\n{text}", ("7",)) for i, text in enumerate(texts)
    ]
    for controller in ("self_consistency", "parallel_probe", "cmc"):
        proxy.backend.opened = 0
        _, headers, reply = await proxy.ask("0.6", tts={"controller": controller})
        assert headers["x-tts-stop"] == "answered", controller
        assert reply["tts"]["answer"] == "7"


async def test_three_replies_without_an_answer_end_the_episode_despite_a_probe_answer(proxy: Proxy) -> None:
    proxy.backend.chains = [
        Chain(f"<think>1 + 1 = {mark * (90 + 40 * i)}</think>\n\nRoses are red", ("7",))
        for i, mark in enumerate("abcdefgh")
    ]
    _, headers, reply = await proxy.ask("0.5", tts={"controller": "parallel_probe"})
    assert headers["x-tts-stop"] == "not_votable"
    assert reply["tts"]["agreed"] is None
    assert proxy.backend.opened > 3


async def test_the_reply_names_an_answer_without_votes(proxy: Proxy) -> None:
    proxy.backend.chains = [chain("7", 300, ["7"], mark=mark) for mark in "abcdefgh"]
    proxy.backend.fault, proxy.backend.fault_after, proxy.backend.fault_times = "hang", 0, 1
    _, _, reply = await proxy.ask("0.5", tts={"controller": "cmc", "deadline_s": 1.0, "answer": "boxed"})
    assert reply["choices"][0]["message"]["content"].endswith("\\boxed{7}")
    assert reply["tts"]["stop"] == "deadline"
    assert (reply["tts"]["answer"], reply["tts"]["agreed"], reply["tts"]["votes"]) == ("7", None, {})


@pytest.mark.parametrize("answer", [None, "boxed"])
@pytest.mark.parametrize("limit", [16, INTERVAL, 3 * INTERVAL])
async def test_with_ignore_eos_all_branches_run_to_the_limit(proxy: Proxy, limit: int, answer: str | None) -> None:
    proxy.backend.chains = [chain("7", 400, [""], mark=mark) for mark in "abcdefgh"]
    tts = {"controller": "self_consistency@4"} | ({} if answer is None else {"answer": answer})
    status, headers, reply = await proxy.ask("0", max_tokens=limit, ignore_eos=True, tts=tts)
    assert status == 200, reply
    assert proxy.backend.opened == reply["tts"]["branches"] == 4
    assert proxy.backend.generated == reply["usage"]["completion_tokens"] == 4 * limit
    assert (reply["tts"]["votes"], reply["tts"]["agreed"]) == ({}, None)
    assert headers["x-tts-stop"] == "max_tokens"


@pytest.mark.parametrize("controller", SERVED)
@pytest.mark.parametrize("probe_answers", [[""], ["7"]])
async def test_an_episode_truncated_without_a_vote_stops_as_max_tokens(
    proxy: Proxy, controller: str, probe_answers: list[str]
) -> None:
    proxy.backend.chains = [chain("7", 400, probe_answers, mark=mark) for mark in "abcdefgh"]
    tts = {"controller": controller, "answer": "boxed"}
    _, headers, reply = await proxy.ask("0.25", max_tokens=INTERVAL + 20, tts=tts)
    decided = reply["tts"]["agreed"] is not None
    assert headers["x-tts-stop"] == ("answered" if decided else "max_tokens")
    assert decided or reply["choices"][0]["finish_reason"] == "length"


async def test_an_episode_without_a_vote_stops_as_answered_if_a_branch_finished(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("a" * 50), *(Chain(mark * 400) for mark in "bcdefgh")]
    tts = {"controller": "self_consistency@4", "answer": "boxed"}
    _, headers, reply = await proxy.ask("0.25", max_tokens=INTERVAL + 20, tts=tts)
    assert (headers["x-tts-stop"], reply["tts"]["answer"]) == ("answered", None)
