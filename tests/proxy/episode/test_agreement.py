"""Agreement and confidence in replies of all endpoints, and what follows from too little agreement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers import Limits, State, Stop, Verb
from controllers.builtin import BASELINE, create
from controllers.loading import Spec
from controllers.voting import agreement, confidence, lead_probability
from discovery.audit.explain import explain
from discovery.audit.parity import ServedRecords, check_parity
from proxy.episode.agreement import agreement_rule
from proxy.http.origins import EXPOSED
from proxy.requests.generation_request import TtsOptions
from proxy.rollout.controller_manager import ControllerManager
from proxy.rollout.controller_runner import ControllerRunner
from proxy.server import running
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from proxy.types import AgreementRule, BetaSource, ChosenController, EffectiveBeta, Otherwise
from tests.fakes import ASSISTANT, MODEL, Chain, FakeVLLM, ScriptedEnvironment, chain
from tests.proxy.conftest import SMALL, Proxy
from tests.proxy.recording.test_episode_log import episodes, serving

BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": f"hi{ASSISTANT}"},
    "responses": {"input": "hi"},
}


def chains(*answers: str) -> list[Chain]:
    """Return chains that end in these answers, the first ones repeated without end."""
    return [chain(answer, 100 + 10 * i, ["", answer], mark=chr(97 + i)) for i, answer in enumerate(answers)]


async def post(proxy: Proxy, path: str, **fields: Any) -> tuple[Any, Any]:
    """Return the headers and the JSON of a reply, or of the last event with a `tts` object of a stream."""
    body = {"model": MODEL, **BODIES[path], **fields}
    async with proxy.http.post(f"{proxy.url}/v1/{path}", json=body) as response:
        text = await response.text()
        assert response.status == 200, text
        if not fields.get("stream"):
            return response.headers, json.loads(text)
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return response.headers, [event for event in events if "tts" in event][-1]


@pytest.mark.parametrize("path", BODIES)
async def test_a_reply_has_the_share_of_its_votes_and_the_confidence_of_its_lead(proxy: Proxy, path: str) -> None:
    proxy.backend.chains = chains("7", "9", "7", "7", "8")
    tts = {"beta": 0.5, "controller": "self_consistency@5"}
    headers, reply = await post(proxy, path, tts=tts)
    assert reply["tts"]["votes"] == {"7": 3, "9": 1, "8": 1}
    assert (reply["tts"]["agreement"], reply["tts"]["confidence"]) == (3 / 5, confidence(3, 1))
    assert (headers["x-tts-agreement"], headers["x-tts-confidence"]) == ("0.6", f"{confidence(3, 1):.4g}")
    proxy.backend.opened = 0
    headers, last = await post(proxy, path, tts=tts, stream=True)
    assert (last["tts"]["agreement"], last["tts"]["confidence"]) == (3 / 5, confidence(3, 1))
    assert "x-tts-agreement" not in headers  # they are sent before the first branch


async def test_the_latest_probes_vote_if_no_finished_branch_has(proxy: Proxy) -> None:
    proxy.backend.chains = [chain("7", 300, [answer], mark=mark) for answer, mark in zip("7797", "abcd", strict=True)]
    tts = {"beta": 0.5, "controller": "parallel_probe", "answer": "boxed", "max_total_tokens": 700}
    headers, reply = await post(proxy, "chat/completions", tts=tts)
    assert (reply["tts"]["votes"], reply["tts"]["answer"]) == ({}, "7")
    assert 0.5 < reply["tts"]["agreement"] < 1
    assert reply["tts"]["confidence"] > 0.5
    assert float(headers["x-tts-agreement"]) == pytest.approx(reply["tts"]["agreement"], abs=1e-4)


async def test_a_reply_without_votes_has_neither_figure(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("Roses are red"), Chain("Violets are blue")]
    headers, reply = await post(proxy, "chat/completions", tts={"beta": 0.5})
    assert (reply["tts"]["stop"], reply["tts"]["agreement"], reply["tts"]["confidence"]) == ("not_votable", None, None)
    assert not {"x-tts-agreement", "x-tts-confidence"} & set(headers)


async def test_several_prompts_have_the_lowest_figures_among_them(proxy: Proxy) -> None:
    proxy.backend.chains = chains("7", "7", "7", "9", "7")
    prompts = [f"first{ASSISTANT}", f"second{ASSISTANT}"]
    tts = {"beta": 0.5, "controller": "self_consistency@3"}
    headers, reply = await post(proxy, "completions", prompt=prompts, tts=tts)
    figures = [(one["agreement"], one["confidence"]) for one in reply["tts"]["prompts"]]
    assert len(figures) == 2
    assert (reply["tts"]["agreement"], reply["tts"]["confidence"]) == min(figures)
    assert headers["x-tts-agreement"] == f"{min(figures)[0]:.4g}"
    proxy.backend.chains = [Chain("Roses are red")]
    headers, reply = await post(proxy, "completions", prompt=prompts, tts=tts)
    assert reply["tts"]["agreement"] is None
    assert "x-tts-agreement" not in headers


def test_the_example_in_the_manual_has_the_figures_of_its_votes() -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    start = page.index('{"applied": true')
    tts = json.loads(page[start : page.index("```", start)])
    votes = dict(enumerate(tts["votes"].values()))
    assert next(iter(tts["votes"])) == tts["answer"]
    assert (tts["agreement"], tts["confidence"]) == (agreement(votes, 0), lead_probability(votes, 0))
    assert f"x-tts-agreement: {tts['agreement']:.4g}\nx-tts-confidence: {tts['confidence']:.4g}" in page


# Too little agreement

FIVE = {"beta": 0.5, "controller": "self_consistency@5", "answer": "boxed", "min_agreement": 0.7}
SPLIT = ("7", "9", "7", "9", "8")
"""Answers of five branches, of which two agree."""


async def test_a_reply_is_flagged_if_less_of_its_votes_agree_than_asked_for(proxy: Proxy) -> None:
    proxy.backend.chains = chains("7", "9", "7", "7", "8")
    for minimum, otherwise, flagged, outcome in (
        (0.7, {}, True, "flagged"),
        (0.6, {}, False, None),
        (0.7, {"otherwise": "answer"}, False, "answered"),
    ):
        before = await proxy.metric("autotts_low_agreement_total")
        headers, reply = await post(proxy, "chat/completions", tts=FIVE | {"min_agreement": minimum} | otherwise)
        assert (reply["tts"]["flagged"], reply["tts"]["min_agreement"]) == (flagged, minimum)
        assert headers.get("x-tts-flagged") == ("true" if flagged else None)
        assert "escalated_beta" not in reply["tts"]
        counted = await proxy.metric("autotts_low_agreement_total") - before
        assert counted == (outcome is not None)
        assert outcome is None or await proxy.metric("autotts_low_agreement_total", outcome=outcome) == 1
    _, reply = await post(proxy, "chat/completions", tts={"beta": 0.5})
    assert "flagged" not in reply["tts"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_escalation_keeps_the_branches_and_adds_others(proxy: Proxy, path: str, stream: bool) -> None:
    proxy.backend.chains = chains(*SPLIT, *"7" * 20)
    headers, reply = await post(proxy, path, stream=stream, tts=FIVE | {"otherwise": "escalate"})
    tts = reply["tts"]
    assert (tts["escalated_beta"], tts["flagged"], tts["stop"], tts["answer"]) == (1, False, "answered", "7")
    assert (tts["votes"]["9"], tts["votes"]["8"]) == (2, 1)
    assert tts["agreement"] == tts["votes"]["7"] / sum(tts["votes"].values()) >= 0.7
    assert tts["branches"] == proxy.backend.opened >= sum(tts["votes"].values()) > 5
    assert tts["tokens"]["total"] == proxy.backend.generated <= sum(one.tokens for one in opened(proxy))
    assert stream or headers["x-tts-escalated-beta"] == "1"
    assert await proxy.metric("autotts_low_agreement_total", outcome="escalated") == 1
    assert await proxy.metric("autotts_fallbacks_total") == 0


def opened(proxy: Proxy) -> list[Chain]:
    """Return the chains that the upstream has begun."""
    every = proxy.backend.chains
    return [every[at % len(every)] for at in range(proxy.backend.opened)]


async def test_escalation_happens_once_and_then_flags(proxy: Proxy) -> None:
    proxy.backend.chains = chains(*SPLIT, *"797989798")
    headers, reply = await post(proxy, "chat/completions", tts=FIVE | {"otherwise": "escalate"})
    tts = reply["tts"]
    assert (tts["flagged"], tts["escalated_beta"], headers["x-tts-flagged"]) == (True, 1, "true")
    assert {name.lower() for name in headers if name.lower().startswith("x-tts-")} <= set(EXPOSED)  # to web pages
    assert tts["agreement"] < 0.7
    assert 5 < tts["branches"] == proxy.backend.opened <= 64
    assert await proxy.metric("autotts_low_agreement_total", outcome="escalated_flagged") == 1


async def test_escalation_ends_at_the_given_beta(proxy: Proxy) -> None:
    spent = []
    for beta in (0.55, 0.6, 1):
        proxy.backend.chains, proxy.backend.opened = chains(*SPLIT, *"79" * 10), 0
        _, reply = await post(proxy, "chat/completions", tts=FIVE | {"otherwise": "escalate", "escalate_beta": beta})
        assert reply["tts"]["escalated_beta"] == beta
        spent.append(reply["tts"]["branches"])
    assert spent == sorted(spent)


@pytest.mark.parametrize("cap", [800, 1100, 2000])
async def test_escalation_stays_under_the_cap_of_the_request(proxy: Proxy, cap: int) -> None:
    proxy.backend.chains = chains(*SPLIT, *"7979")
    body = FIVE | {"otherwise": "escalate", "max_total_tokens": cap}
    _, reply = await post(proxy, "chat/completions", tts=body)
    tts = reply["tts"]
    assert proxy.backend.generated <= tts["tokens"]["total"] <= cap
    assert tts["flagged"] is True
    if cap == 2000:
        assert (tts["stop"], tts["escalated_beta"]) == ("max_tokens", 1)
        assert tts["answer"] in ("7", "9")


async def test_without_room_for_another_branch_the_answer_of_the_controller_is_kept(proxy: Proxy) -> None:
    proxy.backend.chains = chains(*SPLIT)
    _, reply = await post(proxy, "chat/completions", tts=FIVE)
    cap = reply["tts"]["tokens"]["total"] + 150
    proxy.backend.opened = 0
    body = FIVE | {"otherwise": "escalate", "max_total_tokens": cap}
    _, capped = await post(proxy, "chat/completions", tts=body)
    assert (capped["tts"]["stop"], capped["tts"]["answer"]) == ("answered", reply["tts"]["answer"])
    assert capped["tts"]["flagged"]
    assert "escalated_beta" not in capped["tts"]


async def test_escalation_stays_within_the_deadline_and_replies_with_the_best_so_far(proxy: Proxy) -> None:
    proxy.backend.chains = chains(*SPLIT, *"7979")
    await post(proxy, "chat/completions", tts=FIVE)
    requests = len(proxy.backend.requests)
    proxy.backend.opened = 0
    proxy.backend.fault, proxy.backend.fault_after, proxy.backend.fault_times = "hang", 2 * requests, 1
    body = FIVE | {"otherwise": "escalate", "deadline_s": 2.0}
    _, reply = await post(proxy, "chat/completions", tts=body)
    assert (reply["tts"]["stop"], reply["tts"]["escalated_beta"], reply["tts"]["flagged"]) == ("deadline", 1, True)
    assert sum(reply["tts"]["votes"].values()) == 5


async def test_a_request_at_the_largest_beta_is_flagged_without_escalation(proxy: Proxy) -> None:
    proxy.backend.chains = chains(*SPLIT)
    _, reply = await post(proxy, "chat/completions", tts=FIVE | {"beta": 1, "otherwise": "escalate"})
    assert (reply["tts"]["branches"], reply["tts"]["flagged"]) == (5, True)
    assert "escalated_beta" not in reply["tts"]


async def test_a_reply_without_votes_is_flagged_and_escalation_costs_nothing(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("Roses are red"), Chain("Violets are blue")]
    _, plain = await post(proxy, "chat/completions", tts={"beta": 0.5})
    for otherwise in ("flag", "escalate"):
        proxy.backend.opened = 0
        body = {"beta": 0.5, "min_agreement": 0.5, "otherwise": otherwise}
        headers, reply = await post(proxy, "chat/completions", tts=body)
        assert (reply["tts"]["stop"], headers["x-tts-flagged"]) == ("not_votable", "true")
        assert reply["tts"]["tokens"] == plain["tts"]["tokens"]


async def test_several_prompts_are_flagged_if_one_is(proxy: Proxy) -> None:
    proxy.backend.chains = chains(*SPLIT)
    prompts = [f"first{ASSISTANT}", f"second{ASSISTANT}"]
    headers, reply = await post(proxy, "completions", prompt=prompts, tts=FIVE)
    assert (reply["tts"]["flagged"], reply["tts"]["min_agreement"]) == (True, 0.7)
    assert headers["x-tts-flagged"] == "true"
    assert "escalated_beta" not in reply["tts"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_agreement": 1.5}, "tts.min_agreement"),
        ({"min_agreement": -0.1}, "tts.min_agreement"),
        ({"min_agreement": "0.7"}, "tts.min_agreement"),
        ({"min_agreement": True}, "tts.min_agreement"),
        ({"min_agreement": 0.7, "otherwise": "retry"}, "tts.otherwise"),
        ({"min_agreement": 0.7, "otherwise": "escalate", "escalate_beta": 2}, "tts.escalate_beta"),
        ({"min_agreement": 0.7, "otherwise": "escalate", "escalate_beta": 0.4}, "tts.escalate_beta"),
        ({"otherwise": "flag"}, "tts.otherwise"),
        ({"escalate_beta": 1}, "tts.escalate_beta"),
    ],
)
async def test_bad_values_are_refused_by_name_before_a_token_is_spent(
    proxy: Proxy, fields: dict[str, Any], param: str
) -> None:
    status, _, reply = await proxy.ask("0.5", tts=fields)
    assert (status, reply["error"]["param"]) == (400, param), reply
    assert proxy.backend.opened == 0


async def test_the_servers_defaults_apply_to_requests_that_set_nothing(backend: FakeVLLM) -> None:
    backend.chains = chains(*SPLIT, *"7" * 20)
    defaults = {**SMALL, "controller": "self_consistency@5", "min_agreement": 0.7, "otherwise": "escalate"}
    async with running(load(upstream=backend.url, **defaults)) as url, aiohttp.ClientSession() as http:

        async def ask(**fields: Any) -> dict[str, Any]:
            backend.opened = 0
            body = {"model": MODEL, **BODIES["chat/completions"], "tts": {"beta": 0.5, **fields}}
            async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                tts: dict[str, Any] = (await response.json())["tts"]
                return tts

        assert (await ask())["escalated_beta"] == 1
        assert ((await ask(otherwise="flag"))["flagged"], backend.opened) == (True, 5)
        unasked = await ask(min_agreement=0)
        assert (unasked["agreement"], backend.opened) == (2 / 5, 5)
        assert "flagged" not in unasked


async def test_an_escalated_episode_is_stored_explained_and_decided_again(backend: FakeVLLM, tmp_path: Path) -> None:
    backend.chains = chains(*SPLIT, *"7979797")
    async with serving(backend, tmp_path / "s.db", store_text="hash") as proxy:
        body = FIVE | {"otherwise": "escalate", "escalate_beta": 0.6}
        _, reply = await post(proxy, "chat/completions", tts=body)
    (kept,) = await episodes(tmp_path / "s.db")
    about, tts = kept.about, reply["tts"]
    assert (about["escalated_beta"], about["min_agreement"], about["flagged"]) == (0.6, 0.7, True)
    assert about["escalated_at"] == about["decided"] < kept.rounds
    explanation = explain(kept)
    assert (explanation["agreement"], explanation["confidence"]) == (tts["agreement"], tts["confidence"])
    assert (explanation["flagged"], explanation["escalated_beta"]) == (True, 0.6)
    assert explanation["why"].endswith("adaptive_consistency had continued at β = 0.6, because less than 70% agreed.")
    assert [one["baseline"] for one in explanation["rounds"]].index(True) == about["escalated_at"]
    decisions = check_parity(ServedRecords([kept], {}, {})).decisions
    assert (decisions.rounds, decisions.agreed) == (kept.rounds, kept.rounds)
    other = replace(kept, about=about | {"escalated_beta": 0.0})
    assert check_parity(ServedRecords([other], {}, {})).decisions.agreed < kept.rounds


async def test_a_failed_controllers_successor_may_be_continued_at_a_larger_beta() -> None:
    environment = ScriptedEnvironment(chains(*SPLIT, *"7" * 60), 40)
    manager = ControllerManager(load(upstream="http://127.0.0.1:1"), Metrics())
    choice = ChosenController(Spec("self_consistency@5"), None)
    manager.quarantined.add(choice.spec.digest)
    state = State(Limits(40))
    runner = ControllerRunner(manager, choice, "m", rule=AgreementRule(0.7, Otherwise.ESCALATE, 1.0))
    await runner.run(0.25, environment, state)
    assert (runner.fallback, runner.decided, runner.escalated_beta) == ("quarantined", 0, 1.0)
    assert runner.escalated_at is not None
    assert state.spent == sum(environment.at)  # what the chains have generated, each once
    assert state.width > len(SPLIT)
    assert [list(played.actions) for played in runner.rounds] == [list(actions) for actions in environment.rounds]
    await manager.close()


MANAGER = ControllerManager(load(upstream="http://127.0.0.1:1"), Metrics())


@given(
    answers=st.lists(st.sampled_from("789"), min_size=24, max_size=24),
    controller=st.sampled_from(["self_consistency@3", "asc@5", "esc", "short_m_at_k", "cmc", "parallel_probe"]),
    minimum=st.sampled_from([0.4, 0.7, 1.0]),
    betas=st.tuples(st.sampled_from([0.1, 0.3]), st.sampled_from([0.4, 1.0])),
    cap=st.none() | st.integers(500, 6000),
)
@settings(max_examples=60, deadline=None)
async def test_escalation_generates_every_token_once_under_the_cap(
    answers: list[str], controller: str, minimum: float, betas: tuple[float, float], cap: int | None
) -> None:
    environment = ScriptedEnvironment(chains(*answers), 40)
    state = State(Limits(40, max_branches=24, branch_tokens=400, max_tokens=cap))
    choice = ChosenController(Spec(controller), None)
    runner = ControllerRunner(MANAGER, choice, "m", rule=AgreementRule(minimum, Otherwise.ESCALATE, betas[1]))
    await runner.run(betas[0], environment, state)
    assert state.spent == sum(environment.at)
    assert cap is None or state.spent <= cap
    assert state.stop in (Stop.ANSWERED, Stop.MAX_TOKENS)
    verbs = [action.verb for played in runner.rounds for action in played.actions]
    assert verbs.count(Verb.ANSWER) == (state.stop is Stop.ANSWERED)  # the answer that was held back left no trace
    share = agreement(state.deciding_votes(), state.answer)
    if runner.escalated_at is None and state.stop is Stop.ANSWERED and (share or 0) < minimum:
        more = create(BASELINE, betas[1]).decide(before_the_answer(state, runner))
        assert more[0].verb is Verb.ANSWER or not state.affordable(more)


def before_the_answer(state: State, runner: ControllerRunner) -> State:
    """Return the state before the last round of an episode."""
    earlier = State(state.limits)
    for played in runner.rounds[:-1]:
        earlier.apply(played.actions, played.facts)
    return earlier


def test_load_shedding_shrinks_the_larger_beta_by_the_same_factor() -> None:
    options = TtsOptions(min_agreement=0.7, otherwise=Otherwise.ESCALATE)
    server = load(upstream="http://127.0.0.1:1")
    beta = EffectiveBeta(0.5, BetaSource.BODY)
    assert agreement_rule(options, server, beta) == AgreementRule(0.7, Otherwise.ESCALATE, 1.0)
    assert agreement_rule(options, server, beta.scaled(0.5)) == AgreementRule(0.7, Otherwise.ESCALATE, 0.5)
    idle = EffectiveBeta(0.0, BetaSource.BODY)
    assert agreement_rule(options, server, idle.scaled(0.5)) == AgreementRule(0.7, Otherwise.ESCALATE, None)
    assert agreement_rule(TtsOptions(), server, beta) is None
