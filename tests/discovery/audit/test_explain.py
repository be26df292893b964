"""Explanations of episodes: figures match the rounds, and any legal episode can be explained."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers import TO_END, Action, Limits, State, Stop, advance, answer, branch, probe, prune
from controllers.loading import Spec
from discovery.answers import redacted
from discovery.audit.explain import consistency_estimates, display_answer, explain, restricted_mean
from discovery.data.packed_rounds import pack_rounds, unpack_rounds
from discovery.data.recordings import RecordedBranch, RecordedQuestion, question_id
from discovery.errors import TraceError
from discovery.store import EpisodeDetails, ServedEpisode
from tests.discovery.audit.served import serve, write
from tests.discovery.evaluation.test_evaluate import autotts, question
from tests.fakes import Scripted

CHAINS = [
    RecordedBranch(["7", "7", "7"], 310, "7", [3, 3, 3]),
    RecordedBranch(["9", "9"], 250, "9", [3, 3]),
    RecordedBranch([], 80, "7"),
    RecordedBranch([None, "8"], 290, "8", [3, 3]),
    RecordedBranch(["7"], 190, "7", [3]),
]
RECORDED = RecordedQuestion(question_id("q"), "m", "b", 100, CHAINS, "7")
ALL_USED = "; all 5 branches that it could open were used"
MINE = Spec("mine", "class Mine: ...")


def scripted(*rounds: Sequence[Action], **changes: object) -> ServedEpisode:
    return serve(RECORDED, MINE, 0.5, "r", controller=Scripted(*rounds), **changes)  # type: ignore[arg-type]


GIVEN_UP = scripted(
    [branch() for _ in range(5)],
    [probe(0), probe(1), probe(3), prune(4)],
    [advance(0), prune(1), prune(3)],
    [advance(0, TO_END)],
)


def test_each_round_is_summarised_with_its_actions_votes_and_tokens() -> None:
    explanation = explain(GIVEN_UP)
    assert [one["tokens"] for one in explanation["rounds"]] == [480, 489, 589, 699, 699]
    first, second, third, _, last = explanation["rounds"]
    assert (first["opened"], first["finished"], first["running"]) == ([0, 1, 2, 3, 4], 1, 4)
    assert first["votes"] == [{"label": 0, "answer": "7", "count": 1}]
    assert (second["asked"], second["pruned"]) == ([0, 1, 3], [4])
    assert second["leaning"] == [
        {"label": 0, "answer": "7", "count": 1},
        {"label": 1, "answer": "9", "count": 1},
    ]
    assert (third["advanced"], third["pruned"], third["running"]) == ([0], [1, 3], 1)
    assert (last["answered"], last["votes"]) == (["7"], [{"label": 0, "answer": "7", "count": 2}])
    assert explanation["why"] == f"The controller answered 7 (2 of 2 finished branches; no other was given){ALL_USED}."
    assert (explanation["agreement"], explanation["confidence"]) == (1.0, 7 / 8)
    assert explanation["tokens"] == sum(explanation["ledger"].values()) == 699 + 7


def test_ballots_show_the_mean_confidence_of_finished_branches_and_of_the_latest_probes() -> None:
    chains = [
        RecordedBranch([], 80, "7", (), True, [900], [800]),
        RecordedBranch([], 80, "7", (), True, [801], [800]),
        RecordedBranch(["9"], 180, "9", [3], True, [400, 500], [300, 200], [431]),
        RecordedBranch(["8"], 180, "8", [3]),
    ]
    recorded = RecordedQuestion(question_id("q"), "m", "b", 100, chains, "7")
    spec = Spec("mine", 'class Mine:\n    signals = ("intervals", "probes")\n    def decide(self, state): ...')
    script = Scripted([branch() for _ in chains], [probe(2), probe(3)], [prune(2), prune(3)])
    summary = explain(serve(recorded, spec, 0.5, "r", controller=script))["rounds"][1]
    assert summary["votes"] == [{"label": 0, "answer": "7", "count": 2, "confidence": 850}]
    assert summary["leaning"] == [
        {"label": 1, "answer": "9", "count": 1, "confidence": 431},
        {"label": 2, "answer": "8", "count": 1},
    ]


def test_a_pruned_branch_is_explained_by_its_answer_and_the_leader_at_that_time() -> None:
    pruned = explain(GIVEN_UP)["pruned"]
    assert [(one["branch"], one["round"], one["tokens"]) for one in pruned] == [(4, 2, 100), (1, 3, 100), (3, 3, 100)]
    assert [one["why"] for one in pruned] == [
        "it had not been probed; 7 led with 1 of 1 finished branch",
        "its latest answer was 9, given by 0 of 1 finished branch; 7 led with 1",
        "its latest answer could not be read; 7 led with 1 of 1 finished branch",
    ]
    assert pruned[1]["answer"] == "9"
    assert (pruned[1]["count"], pruned[1]["leader"], pruned[1]["leader_count"]) == (0, "7", 1)


def test_while_no_branch_has_finished_probed_branches_are_counted() -> None:
    opened = [branch(), branch(), branch(3), branch()]
    episode = serve(
        replace(RECORDED, branches=[CHAINS[0], CHAINS[1], CHAINS[0], CHAINS[3]]),
        MINE,
        0.5,
        "r",
        controller=Scripted(opened, [probe(0), probe(1), probe(2), prune(3)], [prune(1), prune(0)]),
    )
    explanation = explain(episode)
    assert [one["why"] for one in explanation["pruned"]] == [
        "it had not been probed; nothing led",
        "its latest answer was 9, given by 1 of 3 probed branches; 7 led with 2",
        "its latest answer was 7, which led with 2 of 3 probed branches",
    ]
    assert explanation["why"] == (
        "The controller answered 7 (1 of 1 probed branch; no other was given); "
        "all 4 branches that it could open were used."
    )
    assert (explanation["agreement"], explanation["confidence"]) == (1.0, 3 / 4)
    assert explanation["estimates"] is None


def test_a_branch_that_finishes_in_the_round_that_prunes_it_is_not_listed_as_pruned() -> None:
    episode = scripted([branch(), branch()], [advance(1, TO_END), prune(1), branch(), prune(2)], [advance(0, TO_END)])
    assert explain(episode)["pruned"] == []


@pytest.mark.parametrize(
    ("stop", "fallback", "message"),
    [
        (
            "max_tokens",
            None,
            "fitted under the limit of 9,000 tokens (the token cap of the request less what its reply may cost), "
            "589 of which were spent; the best answer so far was 7 ",
        ),
        (
            "deadline",
            None,
            "The deadline passed; the best answer so far was 7 (1 of 1 finished branch; ",
        ),
        ("upstream_error", None, "The upstream failed; the best answer so far was 7 "),
        (
            "controller_error",
            None,
            "The controller failed, and no other could take over; the best answer so far ",
        ),
        ("not_votable", None, "The first branch to finish gave no answer that could be voted on."),
        ("disconnected", None, "The client disconnected."),
        ("solar flare", None, "It ended (solar flare)."),
        ("deadline", "late", "; the baseline, short_m_at_k, had decided from round 2 on (late)."),
    ],
)
def test_each_stop_reason_is_explained_in_one_sentence(stop: str, fallback: str | None, message: str) -> None:
    rounds = unpack_rounds(GIVEN_UP.trace)[:3]
    about = GIVEN_UP.about | {
        "fallback": fallback,
        "decided": 3 if fallback is None else 2,
        "spent": 589,
        "limits": {"interval": 100, "max_branches": 5, "branch_tokens": 500, "max_tokens": 9000},
    }
    cut = replace(GIVEN_UP, stop=stop, rounds=3, trace=pack_rounds(rounds), about=about)
    explanation = explain(cut)
    assert message in explanation["why"]
    assert explanation["why"].endswith(".")
    assert [one["baseline"] for one in explanation["rounds"]] == [False, False, fallback is not None]


def test_an_answer_of_the_baseline_is_attributed_to_the_baseline() -> None:
    about = GIVEN_UP.about | {"fallback": "raised", "decided": 0}
    explanation = explain(replace(GIVEN_UP, about=about))
    assert explanation["why"] == (
        f"The baseline answered 7 (2 of 2 finished branches; no other was given){ALL_USED}; "
        "the baseline, short_m_at_k, had decided from round 0 on (raised)."
    )


def test_the_baseline_that_an_episode_names_is_explained() -> None:
    about = GIVEN_UP.about | {"fallback": "raised", "decided": 0, "baseline": "adaptive_consistency"}
    explanation = explain(replace(GIVEN_UP, about=about))
    assert explanation["why"].endswith("the baseline, adaptive_consistency, had decided from round 0 on (raised).")


def test_an_episode_without_rounds_is_explained_by_its_stop_alone() -> None:
    bare = ServedEpisode("e", "r", "m", "cmc", "d", 0.5, 0, 0, {"aborted": 12}, "deadline")
    explanation = explain(bare)
    assert (explanation["rounds"], explanation["pruned"], explanation["estimates"]) == ([], [], None)
    assert explanation["why"] == "The deadline passed; no answer had been given."
    assert explain(replace(bare, stop="answered", answer="7"))["why"] == "The controller answered 7."


def test_a_tie_and_used_up_branches_are_said() -> None:
    tied = [CHAINS[0], CHAINS[1], CHAINS[2]._replace(final="9"), CHAINS[4]]
    script = Scripted([branch() for _ in tied], [advance(at, TO_END) for at in (0, 1, 3)])
    explanation = explain(serve(replace(RECORDED, branches=tied), MINE, 0.5, "r", controller=script))
    assert explanation["why"] == (
        "The controller answered 9 (2 of 4 finished branches; a tie with 7); "
        "all 4 branches that it could open were used."
    )


def test_a_round_that_a_disconnect_cut_is_said_to_be_unfinished() -> None:
    bare = ServedEpisode("e", "r", "m", "sc@64", "d", 0.5, 0, 64, {"aborted": 12_224}, "disconnected")
    assert explain(bare)["why"] == "The client disconnected; round 1 was not finished."
    rounds = unpack_rounds(GIVEN_UP.trace)[:2]
    cut = replace(GIVEN_UP, stop="disconnected", rounds=2, branches=9, trace=pack_rounds(rounds))
    assert explain(cut)["why"] == "The client disconnected; round 3 was not finished."


def test_redacted_answers_are_shown_as_distinct_short_hashes() -> None:
    hidden = [redacted(text) for text in GIVEN_UP.about["answers"]]
    explanation = explain(replace(GIVEN_UP, answer=hidden[0], about=GIVEN_UP.about | {"answers": hidden}))
    assert explanation["answers"] == [f"#{one.removeprefix('veiled:')[:6]}" for one in hidden]
    assert explanation["answers"][0] in explanation["why"]
    assert "veiled" not in json.dumps(explanation)


def test_redacted_answers_with_different_units_are_shown_differently() -> None:
    shown = [display_answer(redacted(text)) for text in ("5", "5 cm", "5 m", "6 m")]
    assert [len(text) for text in shown] == [7, 10, 10, 10]
    assert len(set(shown)) == 4
    assert shown[1].startswith(shown[0])


def test_impossible_rounds_or_limits_raise_a_trace_error() -> None:
    rounds = unpack_rounds(GIVEN_UP.trace)
    with pytest.raises(TraceError, match="r: round 0 is impossible"):
        explain(replace(GIVEN_UP, trace=pack_rounds(rounds[1:])))
    with pytest.raises(TraceError, match="r: its limits are invalid"):
        explain(replace(GIVEN_UP, about=EpisodeDetails(limits={"interval": 0})))


# What self-consistency would have cost


def test_unfinished_branches_enter_the_mean_length_as_censored() -> None:
    mean, beyond = restricted_mean([(1, True), (2, False), (3, True)])
    assert mean == pytest.approx(1 + 2 * 2 / 3)
    assert beyond == 0
    mean, beyond = restricted_mean([(10, True), (30, False)])
    assert (mean, beyond) == (10 + 20 * 0.5, 0.5)
    estimates = consistency_estimates([(10, True), (30, False)])
    assert estimates is not None
    assert [(one["chains"], one["estimated_tokens"]) for one in estimates] == [
        (2, 40), (8, 160), (16, 320), (32, 640), (64, 1280)
    ]  # fmt: skip
    assert {(one["finished"], one["unfinished"], one["at_least"]) for one in estimates} == {(1, 1, True)}
    assert consistency_estimates([(10, False)]) is consistency_estimates([]) is None


lengths = st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=20)


@given(lengths)
def test_the_restricted_mean_is_between_the_plain_mean_and_the_longest_length(lengths: list[tuple[int, bool]]) -> None:
    mean, beyond = restricted_mean(lengths)
    tokens = [length for length, _ in lengths]
    assert sum(tokens) / len(tokens) <= mean + 1e-6
    assert mean <= max(tokens) + 1e-6
    assert (beyond > 0) == any(not ended for length, ended in lengths if length == max(tokens))
    plain, nothing = restricted_mean([(length, True) for length in tokens])
    assert plain == pytest.approx(sum(tokens) / len(tokens))
    assert nothing == 0


# Arbitrary legal episodes


class Whimsical:
    """Controller that returns random legal rounds."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def decide(self, state: State) -> list[Action]:
        rng = self.rng
        if state.rounds > 12 or (state.labels and rng.random() < 0.1):
            leader = state.leader()
            return [answer(leader if leader is None or rng.random() < 0.5 else rng.randrange(state.labels))]
        actions: list[Action] = []
        for index in state.active:
            known, move = state.branches[index], rng.random()
            if move < 0.15:
                actions.append(prune(index))
            elif move < 0.7:
                actions.append(advance(index, rng.choice((1, 1, 2, TO_END))))
                actions += [probe(index)] * (rng.random() < 0.6)
                actions += [prune(index)] * (rng.random() < 0.1)
            elif known.probed < known.intervals:
                actions.append(probe(index))
        for index in range(state.width, min(state.width + rng.randrange(4), state.limits.max_branches)):
            actions.append(branch(rng.choice((1, 2, TO_END))))
            actions += [probe(index)] * (rng.random() < 0.5)
            actions += [prune(index)] * (rng.random() < 0.1)
        return actions or ([branch()] if state.room else [answer(state.leader())])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cut=st.integers(0, 14),
    stop=st.sampled_from([*Stop, "disconnected"]),
    cap=st.none() | st.integers(100, 4000),
    hide=st.booleans(),
)
def test_any_legal_episode_can_be_explained_consistently(
    seed: int, cut: int, stop: str, cap: int | None, hide: bool
) -> None:
    limits = Limits(100, 12, branch_tokens=1000, probe_tokens=3, max_tokens=cap)
    episode = serve(question(seed, branches=12), MINE, 0.5, "r", limits, controller=Whimsical(seed))
    if cut < episode.rounds:
        episode = replace(episode, trace=pack_rounds(unpack_rounds(episode.trace)[:cut]), stop=str(stop), answer=None)
    if hide:
        about = EpisodeDetails(**{k: v for k, v in episode.about.items() if k not in ("limits", "answers", "spent")})  # type: ignore[typeddict-item]
        episode = replace(episode, about=about)
    explanation = explain(episode)
    assert json.loads(json.dumps(explanation)) == explanation
    tokens = [one["tokens"] for one in explanation["rounds"]]
    assert tokens == sorted(tokens)
    assert all(sum(vote["count"] for vote in one["votes"]) <= one["finished"] for one in explanation["rounds"])
    given_up = [one["branch"] for one in explanation["pruned"]]
    assert len(given_up) == len(set(given_up))
    if cut >= episode.rounds:
        assert tokens[-1:] == ([episode.about["spent"]] if tokens and not hide else tokens[-1:])
    for pruned in explanation["pruned"]:
        assert pruned["count"] <= pruned["leader_count"] or pruned["leader"] is None
        assert pruned["branch"] in explanation["rounds"][pruned["round"] - 1]["pruned"]


# The command


@pytest.mark.process
def test_trace_show_prints_known_confidences(tmp_path: Path) -> None:
    chains = [RecordedBranch([], 80, answer, (), True, [sure], [sure]) for answer, sure in (("7", 912), ("8", 431))]
    recorded = RecordedQuestion(question_id("q"), "m", "b", 100, chains, "7")
    episode = serve(recorded, Spec("cisc"), 1.0, "r")
    write(tmp_path / "s.db", [replace(episode, about=episode.about | {"signals": ["intervals"]})])
    shown = autotts("trace", "show", "r", "--store", "s.db", folder=tmp_path).stdout
    assert "7: 1 (912), 8: 1 (431)" in shown
    assert "β = 1, m, signals: intervals" in shown


@pytest.mark.process
def test_trace_show_prints_the_episode_of_a_request_without_control_characters(tmp_path: Path) -> None:
    odd = [redacted("7"), "[bold]9[/bold]\x1b[31m\x9b\x7f\u202e"]
    episode = replace(GIVEN_UP, about=GIVEN_UP.about | {"answers": odd}, answer=odd[0])
    write(tmp_path / "s.db", [episode])
    done = autotts("trace", "show", "r", "--store", "s.db", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (
        "branch 5",
        "probe 3; prune 4",
        "[bold]9[/bold]\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}",
        "it had not been probed; #4e00b5 led with 1 of 1 finished branch",
        "706 tokens were spent:",
        "Estimated tokens of self-consistency, from 2 finished branches and 3 unfinished ones",
        "The controller answered #4e00b5 (2 of 2 finished branches; no other was given); ",
    ):
        assert text in done.stdout
    assert any("█" in line for line in done.stdout.splitlines())
    assert "\x1b" not in done.stdout
    shown = autotts("trace", "show", "r", "--store", "s.db", "--json", folder=tmp_path)
    assert shown.stdout.isascii()  # no text of a model can control a terminal
    assert "\x7f" not in shown.stdout
    assert json.loads(shown.stdout) == explain(episode)


@pytest.mark.process
def test_trace_show_draws_every_round_of_a_long_episode(tmp_path: Path) -> None:
    steps = [[branch()], *([advance(0)] for _ in range(150))]
    recorded = replace(RECORDED, branches=[RecordedBranch(["7"] * 200, 20_010, "7")])
    write(tmp_path / "s.db", [serve(recorded, MINE, 0, "long", controller=Scripted(*steps, [advance(0, TO_END)]))])
    done = autotts("trace", "show", "long", "--store", "s.db", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("advance 1") == 151
    assert f"{'·' * 59}█" in done.stdout


@pytest.mark.process
def test_an_unknown_request_is_reported_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "s.db", [GIVEN_UP])
    for arguments, message in (
        (["x", "--store", "s.db"], "not a request in the store s.db; use the x-request-id of the response"),
        (
            ["x", "--store", "none.db"],
            "x: not a file or folder, and the store none.db does not exist; name a store with --store",
        ),
        (["x" * 300, "--store", "s.db"], "xxx: not a file or folder, and not a request in the store s.db"),
        (["x", "--question", "1"], "x: no traces there"),
        ([".", "--json"], ".: --json works only with ids of served requests"),
    ):
        done = autotts("trace", "show", *arguments, folder=tmp_path)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
        assert done.stderr.strip().count("\n") == 0
