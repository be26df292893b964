"""Replaying the recorded branches of an episode gives the same episode for every controller."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers import (
    TO_END,
    Action,
    Advanced,
    Controller,
    Environment,
    Limits,
    Probed,
    Round,
    State,
    advance,
    answer,
    branch,
    probe,
    prune,
    run_episode,
    run_sync,
)
from controllers.builtin import BUILT_IN, create
from controllers.signals import ALL_SIGNALS, answer_confidence
from discovery.answers import Labels, parse_kind, read_answer
from discovery.data.recordings import RecordedBranch, RecordedQuestion, check_signals, intern_answers
from discovery.errors import BranchCensored
from discovery.evaluation.evaluate import regrade
from discovery.evaluation.replay import ReplayEnvironment
from proxy.errors import SettingsError
from proxy.probe_templates import TEMPLATES, Family
from proxy.recording import recorded_branches
from proxy.server import running
from proxy.settings import load
from tests.fakes import Chain, FakeVLLM, Scripted, ScriptedEnvironment, chain, log_probability
from tests.proxy.conftest import INTERVAL, SMALL

TEMPLATE = TEMPLATES[Family.QWEN3]
ADMIN = {"authorization": "Bearer sesame"}


def play(
    controller: object, environment: Environment, interval: int = INTERVAL, most: int = 64
) -> tuple[State, list[Round]]:
    rounds: list[Round] = []
    state = State(Limits(interval, max_branches=most))
    run_sync(run_episode(controller, environment, state, lambda _, played: rounds.append(played)))  # type: ignore[arg-type]
    return state, [Round(list(played.actions), list(played.facts)) for played in rounds]


def scripted(chains: Sequence[Chain], interval: int = INTERVAL) -> ScriptedEnvironment:
    return ScriptedEnvironment(chains, interval, probe_cost=lambda text: 1 + len(text) % 7)


class EveryInterval:
    """Controller that stops all chains after each interval and probes them. It defines what a recording holds."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def decide(self, state: State) -> list[Action]:
        moves = [move for i in state.active for move in (advance(i), probe(i))]
        for i in range(state.width, self.samples):
            moves += (branch(), probe(i))
        return moves or [answer(state.leader())]


def replayed(branches: Sequence[RecordedBranch], interval: int = INTERVAL) -> ReplayEnvironment:
    recorded = RecordedQuestion("q", "m", "b", interval, branches, "7")
    return ReplayEnvironment(intern_answers(recorded), range(len(branches)))


def record(
    *script: Sequence[object], chains: Sequence[Chain], late: recorded_branches.ProbesByInterval | None = None
) -> list[RecordedBranch]:
    environment = scripted(chains)
    _, rounds = play(Scripted(*script), environment)  # type: ignore[arg-type]
    return recorded_branches.branches(environment, rounds, late or {})


probe_answers = st.lists(st.sampled_from(["", "1", "7", "9"]), min_size=1, max_size=9)
answering = st.builds(chain, st.sampled_from(["7", "9", "12"]), st.integers(40, 400), probe_answers)
unanswering = st.builds(
    lambda length, answers: Chain("<think>" + "m" * length, tuple(answers)), st.integers(0, 300), probe_answers
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    chains=st.lists(answering | unanswering, min_size=1, max_size=12),
    interval=st.integers(3, 90),
    name=st.sampled_from(list(BUILT_IN)),
    beta=st.floats(0, 1),
)
def test_replaying_recorded_branches_reproduces_the_episode(
    chains: list[Chain], interval: int, name: str, beta: float
) -> None:
    environment = scripted(chains, interval)
    _, rounds = play(EveryInterval(len(chains)), environment, interval)
    branches = recorded_branches.branches(environment, rounds)
    assert all(recorded.complete for recorded in branches)
    assert [recorded.tokens for recorded in branches] == [script.tokens for script in chains]

    def decide() -> Controller:
        return create(name, beta)

    live, facts = play(decide(), scripted(chains, interval), interval, len(chains))
    again, same = play(decide(), replayed(branches, interval), interval, len(chains))
    assert same == facts
    assert (again.answer, again.spent, again.stop) == (live.answer, live.spent, live.stop)


CHAIN = chain("7", 130, ["1", "9", "7"])
COMPLETE = RecordedBranch(["1", "9", "7"], 130, "7", [6, 4, 2], complete=True)


def test_probing_round_by_round_or_at_once_records_the_same_branch() -> None:
    step = [advance(0), probe(0)]
    assert record([branch(), probe(0)], step, step, step, chains=[CHAIN]) == [COMPLETE]
    assert record([branch(), probe(0), *step, *step, *step], chains=[CHAIN]) == [COMPLETE]


def test_late_probes_fill_gaps_and_replace_nothing() -> None:
    script = ([branch(2), probe(0)], [advance(0, TO_END), branch(), probe(1)])
    early = chain("9", 300, ["2"])
    late = {(0, 1): Probed(0, 0, 6), (0, 2): Probed(0, None, 99), (0, 3): Probed(0, 1, 2)}
    first, second = record(*script, chains=[CHAIN, early], late=late)
    assert first == RecordedBranch(["9", "9", "7"], 130, "7", [6, 4, 2])
    assert second == RecordedBranch(["2"], 40, None, [6], complete=False)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param([[branch(TO_END)]], RecordedBranch([], 130, "7", [], complete=False), id="never asked"),
        pytest.param(
            [[branch(), probe(0)], [advance(0, 3)]], RecordedBranch(["1"], 130, "7", [6], complete=False), id="gap"
        ),
        pytest.param(
            [[branch(), probe(0)], [advance(0, 2), probe(0)]],
            RecordedBranch(["1"], 120, None, [6], complete=False),
            id="gap before the end",
        ),
        pytest.param(
            [[branch(), probe(0)], [prune(0)]], RecordedBranch(["1"], 40, None, [6], complete=False), id="pruned"
        ),
    ],
)
def test_a_branch_with_unknown_intervals_is_recorded_as_censored(
    script: list[Sequence[object]], expected: RecordedBranch
) -> None:
    (recorded,) = record(*script, chains=[CHAIN])
    assert recorded == expected
    full_intervals = len(recorded.probes)
    if full_intervals:
        known, _ = play(Scripted([branch(full_intervals), probe(0)]), replayed([recorded]))
        assert known.branches[0].tokens == full_intervals * INTERVAL
    with pytest.raises(BranchCensored):
        play(Scripted([branch(full_intervals + 1)]), replayed([recorded]))


def test_a_chain_that_ends_on_an_interval_boundary_is_recorded_complete() -> None:
    assert record([branch(), probe(0)], [advance(0), probe(0)], chains=[chain("7", 80, ["1"])]) == [
        RecordedBranch(["1"], 80, "7", [6])
    ]


def test_a_chain_that_ends_unanswered_in_its_first_interval_has_no_probes() -> None:
    assert record([branch(), probe(0)], chains=[Chain("hm")]) == [RecordedBranch([], 3, None, [])]


# Live


class Admin:
    """A proxy with an admin key over the fake vLLM."""

    def __init__(self, backend: FakeVLLM, url: str, http: aiohttp.ClientSession) -> None:
        self.backend = backend
        self.url = f"{url}/v1/chat/completions"
        self.http = http

    async def ask(self, controller: str, key: dict[str, str] = ADMIN, **fields: Any) -> tuple[int, Any]:
        body = _body(controller, **fields)
        async with self.http.post(self.url, json=body, headers=key) as response:
            return response.status, await response.json()


def _body(controller: str, tts: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    merged = {"beta": 1, "controller": controller, "required": True, **(tts or {})}
    return {"messages": [{"role": "user", "content": "hi"}], "tts": merged, **fields}


@pytest_asyncio.fixture
async def admin(backend: FakeVLLM) -> AsyncIterator[Admin]:
    settings = load(upstream=backend.url, admin_key="sesame", **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        yield Admin(backend, url, http)


@pytest.mark.parametrize("key", [{}, {"authorization": "Bearer open"}, {"authorization": "Basic sesame"}])
@pytest.mark.parametrize("controller", ["everything", "everything@3"])
async def test_the_recording_controller_is_refused_without_an_admin_key(
    admin: Admin, controller: str, key: dict[str, str]
) -> None:
    status, reply = await admin.ask(controller, key)
    assert (status, reply["error"]["code"]) == (403, "admin_only")
    assert "send an admin key" in reply["error"]["message"]
    assert admin.backend.requests == []


async def test_the_recording_controller_is_refused_if_no_admin_key_is_set(backend: FakeVLLM) -> None:
    async with running(load(upstream=backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
        status, reply = await Admin(backend, url, http).ask("everything")
    assert (status, reply["error"]["code"]) == (403, "admin_only")
    assert "AUTOTTS_ADMIN_KEY" in reply["error"]["message"]


@pytest.mark.parametrize("name", ["everything", "everything@4"])
def test_the_recording_controller_is_refused_as_default(name: str) -> None:
    with pytest.raises(SettingsError, match=f"controller: {name} is for admins only"):
        load(upstream="http://x", controller=name)


CHAINS = [
    chain("7", 130, ["1", "", "7"], mark="a"),
    chain("9", 70, ["9"], mark="b"),
    Chain("<think>" + "c" * 200, ("2", "3", "")),
    chain("8", 39, ["8"], mark="d"),
    chain("7", 80, ["7"], mark="e"),
]


async def test_branches_recorded_live_equal_the_chains_of_the_upstream(admin: Admin) -> None:
    admin.backend.chains = CHAINS
    status, reply = await admin.ask("everything@5", temperature=0.5, max_tokens=1000)
    assert status == 200, reply
    recording = reply["tts"]["recording"]
    answered = 3  # tokens: one digit, a brace and the end token
    unanswered = len("}") + 1

    def cost(text: str) -> int:
        script = next(candidate for candidate in CHAINS if candidate.text.startswith(text))
        return len(TEMPLATE.suffix("", text)) + (answered if script.probe_answer(len(text), INTERVAL) else unanswered)

    environment = ScriptedEnvironment(CHAINS, INTERVAL, cost)
    _, rounds = play(EveryInterval(5), environment)
    assert [RecordedBranch(**fields) for fields in recording["branches"]] == recorded_branches.branches(
        environment, rounds
    )
    assert all(fields["complete"] for fields in recording["branches"])
    assert (recording["interval"], recording["probe_template"]) == (INTERVAL, TEMPLATE.name)
    assert recording["sampling"] == {"temperature": 0.5, "max_tokens": 1000}
    assert isinstance(recording["chat_template"], str)
    tokens = reply["tts"]["tokens"]
    assert tokens["total"] == sum(fields["tokens"] + sum(fields["probe_tokens"]) for fields in recording["branches"])


async def test_a_recording_with_signals_has_those_of_every_interval_and_probe(admin: Admin) -> None:
    admin.backend.chains = CHAINS
    _, reply = await admin.ask("everything@5", tts={"signals": True}, max_tokens=1000)
    environment = ScriptedEnvironment(CHAINS, INTERVAL, signals=ALL_SIGNALS)
    _, plain = await admin.ask("everything@5", max_tokens=1000)
    for index, fields in enumerate(reply["tts"]["recording"]["branches"]):
        recorded, script = RecordedBranch(**fields), CHAINS[index]
        check_signals(recorded)
        signals = list(zip(recorded.confidences, recorded.lowests, strict=True))
        assert signals == environment.interval_signals(index, script.tokens)
        for at, (label, confidence) in enumerate(zip(recorded.probes, recorded.probe_confidences, strict=True), 1):
            text = script.text[: at * INTERVAL]
            start = len(text + TEMPLATE.suffix("", text))
            digits = [log_probability(ord(char), start + i) for i, char in enumerate(label or "")]
            assert confidence == answer_confidence(digits)
        without = recorded._replace(confidences=(), lowests=(), probe_confidences=())
        assert without == RecordedBranch(**plain["tts"]["recording"]["branches"][index])
    assert reply["usage"] == plain["usage"]
    assert not {"confidences", "lowests", "probe_confidences"} & plain["tts"]["recording"]["branches"][0].keys()


@pytest.mark.parametrize("fault", ["no_logprobs", "unsure"])
async def test_a_recording_from_a_server_without_log_probabilities_has_no_signals(admin: Admin, fault: str) -> None:
    admin.backend.chains, admin.backend.fault = CHAINS, fault
    status, reply = await admin.ask("everything@5", tts={"signals": True}, max_tokens=1000)
    assert status == 200
    assert [RecordedBranch(**fields).has_signals for fields in reply["tts"]["recording"]["branches"]] == [False] * 5


@pytest.mark.parametrize("controller", ["self_consistency", "cmc"])
async def test_signals_are_recorded_with_all_branches_only(admin: Admin, controller: str) -> None:
    status, reply = await admin.ask(controller, tts={"signals": True})
    assert (status, reply["error"]["param"]) == (400, "tts.signals")
    assert "everything" in reply["error"]["message"]
    assert admin.backend.requests == []


async def test_chains_without_an_answer_are_recorded(admin: Admin) -> None:
    prose = "Roses are red, violets are blue, " * 3
    admin.backend.chains = [Chain(f"{i} {prose}" + "and " * i) for i in range(4)]
    _, reply = await admin.ask("everything@4")
    assert (reply["tts"]["stop"], reply["tts"]["answer"]) == ("answered", None)
    assert [
        (fields["tokens"], fields["final"], fields["complete"]) for fields in reply["tts"]["recording"]["branches"]
    ] == [(len(prose) + 4 * i + 3, None, True) for i in range(4)]


@pytest.mark.parametrize("limit", [16, INTERVAL, INTERVAL + 20])
async def test_a_short_max_tokens_still_records_all_branches(admin: Admin, limit: int) -> None:
    admin.backend.chains = [chain("7", 400, mark=mark) for mark in "abcd"]
    _, reply = await admin.ask("everything@4", max_tokens=limit)
    assert reply["tts"]["stop"] == "answered"
    assert [branch["tokens"] for branch in reply["tts"]["recording"]["branches"]] == [limit] * 4


async def test_the_last_event_of_a_stream_has_the_recording(admin: Admin) -> None:
    async with admin.http.post(admin.url, json=_body("everything@2", stream=True), headers=ADMIN) as response:
        events = [line[6:] for line in (await response.text()).splitlines() if line.startswith("data: {")]
    assert len(json.loads(events[-1])["tts"]["recording"]["branches"]) == 2


def _outcome(recorded: dict[str, Any]) -> tuple[int, int, bool]:
    return recorded["tokens"], len(recorded["probes"]), recorded["complete"]


@pytest.mark.parametrize(
    ("stop", "fault", "tts"), [("deadline", "hang", {"deadline_s": 2.0}), ("upstream_error", "cut", {})]
)
async def test_branches_without_all_their_probes_are_returned_as_censored(
    admin: Admin, stop: str, fault: str, tts: dict[str, Any]
) -> None:
    """The last of three requests with probes fails. Two branches have all their probes then, and the third has one."""
    admin.backend.chains = [
        chain("7", length, ["7"], mark=mark) for length, mark in ((400, "a"), (900, "b"), (300, "c"))
    ]
    admin.backend.fault, admin.backend.fault_after, admin.backend.fault_times = fault, 3, 1
    status, reply = await admin.ask("everything@3", tts=tts)
    assert status == 200, reply
    assert reply["tts"]["stop"] == stop
    branches = reply["tts"]["recording"]["branches"]
    assert [_outcome(recorded) for recorded in branches] == [(400, 9, True), (900, 22, True), (300, 1, False)]
    assert reply["tts"]["tokens"]["total"] >= sum(one["tokens"] + sum(one["probe_tokens"]) for one in branches)


async def test_finished_branches_are_recorded_if_the_upstream_failed_later(admin: Admin) -> None:
    """The cap lets the second branch run for one interval. The request that continues it fails."""
    admin.backend.chains = [chain("7", length, ["7"], mark=mark) for length, mark in ((100, "a"), (400, "b"))]
    admin.backend.fault, admin.backend.fault_after, admin.backend.fault_times = "cut", 2, 1
    status, reply = await admin.ask("everything@2", tts={"max_total_tokens": 700}, max_tokens=400)
    assert (status, reply["tts"]["stop"]) == (200, "upstream_error"), reply
    first, second = reply["tts"]["recording"]["branches"]
    assert _outcome(first) == (100, 2, True)
    assert _outcome(second)[1:] == (0, False)


@pytest.mark.parametrize("cap", [500, 700, 1500])
async def test_a_recording_does_not_exceed_its_token_cap(admin: Admin, cap: int) -> None:
    admin.backend.chains = [chain("7", 400, ["7"], mark=mark) for mark in "ab"]
    status, reply = await admin.ask("everything@2", tts={"max_total_tokens": cap}, max_tokens=400)
    assert status == 200, reply
    assert (reply["tts"]["stop"], reply["tts"]["tokens"]["total"] <= cap) == ("max_tokens", True)
    assert not all(recorded["complete"] for recorded in reply["tts"]["recording"]["branches"])


async def test_the_record_of_a_branch_does_not_depend_on_other_branches(admin: Admin) -> None:
    """Equal answers keep the form in which their own branch gave them first."""
    chains = [chain("0.5", 130, ["0.5"], mark="a"), chain("1/2", 130, ["1/2"], mark="b")]
    admin.backend.chains = [*chains, chains[1]]
    _, both = await admin.ask("everything@2")
    _, alone = await admin.ask("everything@1")
    first, second = both["tts"]["recording"]["branches"]
    assert (first["final"], second["final"], second["probes"]) == ("0.5", "1/2", ["1/2"] * 3)
    assert [second] == alone["tts"]["recording"]["branches"]


@pytest.mark.parametrize("opening", ["<think>", ""])
async def test_probes_after_the_thought_do_not_close_it_again(admin: Admin, opening: str) -> None:
    """The suffix depends on the text at that point: the thought is open, closed, or was never opened."""
    text = f"{opening}{'m' * 90}</think>\n\n{'r' * 100} \\boxed{{7}}" if opening else "m" * 200 + " \\boxed{7}"
    admin.backend.chains = [Chain(text, ("7",))]
    _, reply = await admin.ask("everything@1")
    (recorded,) = reply["tts"]["recording"]["branches"]
    prompt = admin.backend.requests[-1]["prompt"]
    prompts = ["".join(map(chr, ids)) for ids in (prompt if isinstance(prompt[0], list) else [prompt])]
    assert len(prompts) == len(recorded["probes"]) == (len(text) + 1) // INTERVAL
    for intervals, asked in enumerate(prompts, start=1):
        known = text[: intervals * INTERVAL]
        assert asked.endswith(known + TEMPLATE.suffix("", known))


async def test_a_branch_takes_few_requests_to_find_its_suffixes(admin: Admin) -> None:
    admin.backend.chains = [chain("7", 900, ["7"])]
    await admin.ask("everything@1")
    before = admin.backend.decoded
    admin.backend.chains.append(chain("7", 900, ["7"]))
    await admin.ask("everything@1")
    assert len(admin.backend.requests[-1]["prompt"]) == 22 - 16
    assert admin.backend.decoded - before <= 6


async def test_a_recording_that_fails_entirely_reports_its_tokens(admin: Admin) -> None:
    admin.backend.chains = [chain("7", 400, [""], mark="a")]
    admin.backend.fault = "cut"
    async with admin.http.post(admin.url, json=_body("everything@1"), headers=ADMIN) as response:
        assert response.status == 502
        assert response.headers["x-tts-tokens"] == "1"


class Lettered:
    """An episode whose chains all chose B; the first wrote it in a way that only its kind of answer reads."""

    def __init__(self) -> None:
        self.labels = Labels()
        for text in (r"\boxed{b}", r"\boxed{B}"):
            chosen = read_answer(text, parse_kind("choice"))
            assert chosen is not None
            assert self.labels.label_of(chosen.form, chosen.written) == 0

    def interval_signals(self, index: int, tokens: int) -> Sequence[tuple[int | None, int | None]]:
        return ()


def test_a_choice_in_small_letters_is_right_in_replay() -> None:
    facts = [Advanced(index, 1, 10, finished=True, label=0) for index in range(2)]
    branches = recorded_branches.branches(Lettered(), [Round([branch(), branch()], facts)])
    assert [one.final for one in branches] == ["B", "B"]
    recording = regrade(RecordedQuestion("q", "m", "b", INTERVAL, branches, "B"))
    assert recording.reference == 0
    assert recording.finals.tolist() == [0, 0]
