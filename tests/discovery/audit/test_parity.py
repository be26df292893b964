"""Parity checks: consistent records pass, and every kind of inconsistency is reported."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers import TO_END, Action, Controller, Limits, State, Stop, advance, answer, probe
from controllers.builtin import BASELINE, BUILT_IN
from controllers.loading import Spec, make, parse_spec, read
from discovery.answers import redacted
from discovery.audit.decision_replay import NO_FITTING_ACTION, find_controllers, format_actions, replay_decisions
from discovery.audit.parity import KnownAnswer, ServedRecords, _mean, _paired, _Row, check_parity, load_records
from discovery.audit.parity_report import LiveReplayComparison, MeanInterval, ParityVerdict
from discovery.data.packed_rounds import pack_rounds, unpack_rounds
from discovery.data.recordings import LabelSource, RecordedBranch, RecordedQuestion
from discovery.store import Feedback, Label, ServedEpisode, Store
from tests.discovery.audit.served import live, serve, write
from tests.discovery.evaluation.test_evaluate import autotts, question

CMC, SC = Spec("cmc"), Spec("self_consistency")
LIMITS = Limits(100, 64)
QUESTIONS = [question(number, branches=20) for number in range(14)]
FOREIGN = """
from controllers import advance, answer, branch
class Mine:
    def __init__(self, beta): self.chains = 2 + round(4 * beta)
    def decide(self, state):
        if not state.width: return [branch()] * self.chains
        return [advance(i) for i in state.active] or [answer(state.leader())]
"""


def consistent(spec: Spec = CMC, beta: float = 0.3, questions: Sequence[RecordedQuestion] = QUESTIONS) -> ServedRecords:
    """Return episodes of a controller, each with its recording."""
    episodes = [serve(one, spec, beta, f"r{at}", LIMITS) for at, one in enumerate(questions)]
    return ServedRecords(
        episodes, {f"r{at}": live(one, f"r{at}") for at, one in enumerate(questions)}, known(questions)
    )


def known(questions: Sequence[RecordedQuestion]) -> dict[str, KnownAnswer]:
    """Return the correct answer of each question, 7."""
    return {one.question: KnownAnswer("7", LabelSource.REFERENCE) for one in questions}


def changed(records: ServedRecords, at: int, **changes: Any) -> ServedRecords:
    """Return the records with changes to one episode; `about` is merged."""
    episodes = list(records.episodes)
    about = episodes[at].about | changes.pop("about", {})
    episodes[at] = replace(episodes[at], about=about, **changes)
    return replace(records, episodes=episodes)


@pytest.mark.parametrize(("name", "beta"), [("cmc", 0.3), ("self_consistency", 0.5), ("parallel_probe@12", 0.4)])
def test_consistent_records_pass_every_check(name: str, beta: float) -> None:
    report = check_parity(consistent(Spec(name), beta))
    assert report.decisions.rounds == report.decisions.agreed > 14
    assert (report.decisions.episodes, report.decisions.unreached) == (14, 0)
    assert (report.decisions.disagreements, report.decisions.unchecked, report.reproduced.differing) == ([], [], [])
    assert report.reproduced.episodes == 14
    (group,) = report.groups
    assert (group.controller, group.beta, group.episodes, group.recorded) == (name, beta, 14, 14)
    assert group.verdict is ParityVerdict.AGREE
    assert group.accuracy is not None
    assert group.labels == {"reference": 14}
    assert (group.finalise, group.aborted) == (7, 0)
    assert report.holds
    body = json.loads(json.dumps(report.as_json()))
    assert (body["checked"], body["holds"]) == (True, True)


def with_signals(recorded: RecordedQuestion, seed: int) -> RecordedQuestion:
    """Return the recording with random signals of every interval and probe; right chains are surer."""
    drawn = random.Random(seed)
    branches = []
    for branch in recorded.branches:
        intervals, least = len(branch.probes) + 1, 500 if branch.final == "7" else 100
        confidences, lowests = ([drawn.randrange(least, 1001) for _ in range(intervals)] for _ in range(2))
        sure = [drawn.choice([None, drawn.randrange(1001)]) for _ in branch.probes]
        branches.append(branch._replace(confidences=confidences, lowests=lowests, probe_confidences=sure))
    return replace(recorded, branches=branches)


@pytest.mark.parametrize(("name", "beta"), [("cisc", 0.5), ("confident", 0.6), ("mars", 0.5)])
def test_episodes_of_controllers_that_read_signals_are_decided_and_replayed_alike(name: str, beta: float) -> None:
    questions = [with_signals(recorded, seed) for seed, recorded in enumerate(QUESTIONS)]
    records = consistent(Spec(name), beta, questions)
    facts = [fact for one in records.episodes for played in unpack_rounds(one.trace) for fact in played.facts]
    assert any(fact.confidence is not None for fact in facts)
    report = check_parity(records, shuffles=3)
    assert report.decisions.rounds == report.decisions.agreed
    assert (report.decisions.disagreements, report.reproduced.differing, report.reproduced.episodes) == ([], [], 14)
    plain = {request: live(recorded, request) for request, recorded in zip(records.recordings, QUESTIONS, strict=True)}
    differing = check_parity(replace(records, recordings=plain), shuffles=3).reproduced.differing
    assert differing  # without their signals, the recordings lead to other decisions


def test_reported_means_equal_those_of_the_episodes() -> None:
    records = consistent()
    (group,) = check_parity(records, shuffles=3).groups
    spent = [one.about["spent"] for one in records.episodes]
    right = [one.answer == "7" for one in records.episodes]
    assert group.tokens.live.mean == pytest.approx(np.mean(spent))
    assert group.accuracy is not None
    assert group.accuracy.live.mean == pytest.approx(100 * np.mean(right))
    assert group.tokens.paired.mean == pytest.approx(group.tokens.live.mean - group.tokens.replayed.mean)


# Inconsistent records


def test_a_changed_decision_is_reported_as_a_disagreement() -> None:
    records = consistent()
    rounds = unpack_rounds(records.episodes[3].trace)
    last = len(rounds) - 1
    label = rounds[last].actions[0].label
    rounds[last] = rounds[last]._replace(actions=[answer(1 if label == 0 else 0)])
    report = check_parity(changed(records, 3, trace=pack_rounds(rounds)))
    (disagreement,) = report.decisions.disagreements
    assert disagreement == ("r3", last, f"answer({label})", f"answer({1 if label == 0 else 0})")
    assert report.decisions.rounds == report.decisions.agreed + 1
    assert not report.holds


def test_rounds_after_a_disagreement_are_counted_as_unreached() -> None:
    records = consistent()
    decisions = check_parity(changed(records, 3, beta=1.0)).decisions
    (disagreement,) = decisions.disagreements
    assert (disagreement.request, disagreement.round) == ("r3", 0)
    assert (disagreement.asked, disagreement.played) == ("8 × branch()", "4 × branch()")
    assert decisions.unreached == records.episodes[3].rounds - 1
    assert decisions.rounds + decisions.unreached == sum(one.rounds for one in records.episodes)


def test_changed_tokens_are_reported_as_not_reproduced() -> None:
    records = consistent()
    spent = records.episodes[5].about["spent"]
    report = check_parity(changed(records, 5, about={"spent": spent + 1}))
    assert [(one.request, one.spent, one.replayed) for one in report.reproduced.differing] == [("r5", spent + 1, spent)]
    assert not report.holds


def test_a_recording_with_other_branches_is_reported_as_not_reproduced() -> None:
    records = consistent()
    recorded = records.recordings["r5"]
    first = recorded.branches[0]._replace(tokens=recorded.branches[0].tokens + 1)
    other = replace(recorded, branches=[first, *recorded.branches[1:]])
    reproduced = check_parity(replace(records, recordings={**records.recordings, "r5": other})).reproduced
    assert [one.request for one in reproduced.differing] == ["r5"]
    narrow = replace(recorded, branches=recorded.branches[:2])  # fewer than the episode opened
    reproduced = check_parity(replace(records, recordings={**records.recordings, "r5": narrow})).reproduced
    assert [one.request for one in reproduced.differing] == ["r5"]


def test_live_token_means_that_differ_from_replay_disagree() -> None:
    records = consistent()
    for at, episode in enumerate(records.episodes):
        records = changed(records, at, about={"spent": episode.about["spent"] * 2})
    (group,) = check_parity(records).groups
    assert group.tokens.verdict is group.verdict is ParityVerdict.DISAGREE
    assert group.tokens.paired.low is not None
    assert group.tokens.paired.low > 0
    assert group.accuracy is not None
    assert group.accuracy.verdict is ParityVerdict.AGREE


def test_live_answers_worse_than_in_replay_disagree() -> None:
    records = consistent()
    for at in range(14):
        records = changed(records, at, answer="8")
    (group,) = check_parity(records).groups
    assert group.accuracy is not None
    assert group.accuracy.verdict is group.verdict is ParityVerdict.DISAGREE
    assert group.accuracy.live.high is not None
    assert group.accuracy.live.mean == 0 < group.accuracy.live.high  # 0 of 14 does not prove an accuracy of 0
    assert len(check_parity(records).reproduced.differing) == sum(one.answer == "7" for one in consistent().episodes)


def test_the_interval_of_a_paired_difference_has_its_stated_coverage() -> None:
    rng = np.random.default_rng(3)
    missed = {"tokens": 0, "nearly all right": 0}
    for _ in range(60):
        for kind in missed:
            rows = []
            for number in range(15):
                values = rng.lognormal(7, 0.5, 21) if kind == "tokens" else 100.0 * (rng.random(21) < 0.98)
                rows.append(_Row(str(number), values[0], list(values[1:])))
            mean = _paired(rows)
            assert mean.low is not None
            assert mean.high is not None
            missed[kind] += not mean.low <= 0 <= mean.high
    assert missed["tokens"] <= 9  # 3 are expected; more than 9 occur in fewer than 1 % of runs
    assert missed["nearly all right"] <= 9


def test_repeated_requests_of_one_question_count_once() -> None:
    assert _mean([("a", 0), ("b", 6), ("b", 2), ("b", 1)], percent=False).mean == 1.5
    assert _paired([_Row("a", 0, [2, 2]), _Row("b", 6, [2, 2]), _Row("b", 2, [2, 2])]).mean == 0
    assert _mean([("a", 3)], percent=False)[1:] == (None, None, 1)


STILL = MeanInterval(0, -1, 1, 10)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, ParityVerdict.AGREE),
        (
            {"live": MeanInterval(50, 40, 60, 10)},
            ParityVerdict.DISAGREE,
        ),  # the intervals do not overlap, though the paired difference is near 0
        (
            {"paired": MeanInterval(3, 1, 5, 10)},
            ParityVerdict.DISAGREE,
        ),  # the paired difference is not near 0, though the intervals overlap
        ({"paired": MeanInterval(-3, -5, -1, 10)}, ParityVerdict.DISAGREE),
        ({"live": MeanInterval(9, 8, 12, 10), "replayed": MeanInterval(14, 12, 15, 10)}, ParityVerdict.AGREE),
        ({"paired": MeanInterval(0, -1, 1, 9)}, ParityVerdict.TOO_LITTLE),
    ],
)
def test_the_verdict_is_the_worse_of_the_overall_and_the_paired_comparison(
    changes: dict[str, MeanInterval], verdict: ParityVerdict
) -> None:
    figure = LiveReplayComparison(MeanInterval(10, 8, 12, 10), MeanInterval(10, 8, 12, 10), STILL)
    assert replace(figure, **changes).verdict is verdict


def test_episodes_cut_by_a_deadline_are_left_out_of_the_means() -> None:
    records = consistent()
    cut = [
        replace(
            episode, id=f"d{at}", request_id=f"d{at}", stop="deadline", answer=None, about=episode.about | {"spent": 1}
        )
        for at, episode in enumerate(records.episodes)
    ]
    report = check_parity(replace(records, episodes=[*records.episodes, *cut]))
    (group,) = report.groups
    assert (group.verdict, group.episodes, group.left_out) == (ParityVerdict.AGREE, 14, {"deadline": 14})
    assert group.tokens.live == check_parity(records).groups[0].tokens.live


# Who decided


class Replaced:
    """Controller that decides the first rounds, after which the baseline takes over."""

    def __init__(self, first: Controller, rounds: int, beta: float) -> None:
        self.first, self.rounds, self.baseline = first, rounds, make(Spec(BASELINE), beta)

    def decide(self, state: State) -> Sequence[Action]:
        return (self.first if state.rounds < self.rounds else self.baseline).decide(state)


LONG = replace(QUESTIONS[0], branches=[RecordedBranch(["7"] * 9, 930, "7", [3] * 9)] * 20)


def replaced(rounds: int, cap: int | None = None, recorded: RecordedQuestion = LONG) -> ServedEpisode:
    limits = replace(LIMITS, max_tokens=cap, branch_tokens=1000, probe_tokens=3)
    made = serve(recorded, CMC, 0.5, "r", limits, controller=Replaced(make(CMC, 0.5), rounds, 0.5))
    return replace(made, about=made.about | {"fallback": "late", "baseline": BASELINE, "decided": rounds})


@pytest.mark.parametrize("cap", [None, 2200])
@pytest.mark.parametrize("rounds", [0, 2])
def test_rounds_decided_by_the_baseline_are_checked_against_the_baseline(rounds: int, cap: int | None) -> None:
    episode = replaced(rounds, cap=cap)
    ends = episode.stop == "max_tokens"
    assert ends == (cap is not None)
    decisions = check_parity(ServedRecords([episode], {}, {})).decisions
    assert (decisions.rounds, decisions.agreed) == (episode.rounds + ends,) * 2
    other = replace(episode, about=episode.about | {"decided": episode.rounds, "fallback": None})
    if rounds and not ends:  # in earlier rounds both advance all chains
        assert len(check_parity(ServedRecords([other], {}, {})).decisions.disagreements) == 1


def test_episodes_decided_by_the_baseline_are_left_out_of_the_controllers_means() -> None:
    records = consistent()
    odd = [replace(replaced(2), request_id="r0", beta=0.3), replace(records.episodes[1], stop="not_votable")]
    report = check_parity(replace(records, episodes=[*odd, *records.episodes[2:]]))
    (group,) = report.groups
    assert (group.episodes, group.recorded) == (12, 12)
    assert group.left_out == {"baseline decided": 1, "not_votable": 1}
    assert report.reproduced.episodes == 12


def test_episodes_continued_at_a_larger_beta_are_left_out_of_the_controllers_means() -> None:
    records = consistent()
    first, *others = records.episodes
    escalated = replace(first, about=first.about | {"escalated_at": 1, "escalated_beta": 1.0, "min_agreement": 0.7})
    report = check_parity(replace(records, episodes=[escalated, *others]))
    (group,) = report.groups
    assert (group.episodes, group.left_out) == (13, {"continued at a larger β": 1})
    assert report.reproduced.episodes == 13


@pytest.mark.parametrize("stop", ["deadline", "upstream_error", "disconnected"])
def test_a_cut_episode_is_checked_up_to_its_last_round(stop: str) -> None:
    complete = consistent().episodes[0]
    rounds = unpack_rounds(complete.trace)[:3]
    cut = replace(complete, stop=stop, rounds=3, trace=pack_rounds(rounds), about=complete.about | {"decided": 3})
    report = check_parity(ServedRecords([cut], {}, {}))
    assert (report.decisions.rounds, report.decisions.agreed, report.groups) == (3, 3, [])
    capped = check_parity(ServedRecords([replace(cut, stop="max_tokens")], {}, {})).decisions
    (disagreement,) = capped.disagreements
    assert (disagreement.round, disagreement.played) == (3, NO_FITTING_ACTION)
    assert disagreement.asked.startswith("advance(")


def test_a_token_cap_that_did_not_apply_is_reported_as_a_disagreement() -> None:
    complete = consistent().episodes[0]
    limits: Any = {**complete.about["limits"], "max_tokens": 400, "branch_tokens": 1000}
    (disagreement,) = check_parity(
        ServedRecords([replace(complete, about=complete.about | {"limits": limits})], {}, {})
    ).decisions.disagreements
    assert (disagreement.round, disagreement.asked) == (1, NO_FITTING_ACTION)


@pytest.mark.process
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*BUILT_IN, "asc@9", "lockstep_lead"]),
    beta=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 500),
    cap=st.none() | st.integers(150, 6000),
    cut=st.none() | st.integers(0, 30),
)
def test_replaying_any_controller_gives_the_recorded_decisions(
    name: str, beta: float, seed: int, cap: int | None, cut: int | None
) -> None:
    spec = parse_spec(name)
    limits = Limits(100, 12, branch_tokens=1000, probe_tokens=3, max_tokens=cap)
    episode = serve(question(seed, branches=12), spec, beta, "r", limits)
    if cut is not None and cut < episode.rounds:
        rounds, about = unpack_rounds(episode.trace)[:cut], episode.about | {"decided": cut}
        episode = replace(episode, stop=str(Stop.DEADLINE), rounds=cut, trace=pack_rounds(rounds), about=about)
    decisions = replay_decisions([episode], find_controllers([episode], [Spec(name, spec.source)]))
    assert decisions.disagreements == []
    assert decisions.rounds == decisions.agreed == episode.rounds + (episode.stop == "max_tokens")


@pytest.mark.process
def test_a_controller_from_a_file_is_checked_only_with_the_original_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FOREIGN)
    spec = read(path)
    records = consistent(spec, 0.5)
    without = check_parity(records)
    assert [(one.controller, one.episodes) for one in without.decisions.unchecked] == [("mine", 14)]
    assert "no file was given; pass the original mine.py with --controllers" in without.decisions.unchecked[0].why
    assert (without.decisions.rounds, without.reproduced.episodes, without.groups) == (0, 0, [])
    assert not without.checked
    assert not without.holds
    path.write_text(FOREIGN + "\n# later\n")
    assert "the given file has another digest" in check_parity(records, [read(path)]).decisions.unchecked[0].why
    report = check_parity(records, [spec], shuffles=4)
    assert report.decisions.rounds == report.decisions.agreed > 14
    assert (report.decisions.unchecked, report.reproduced.differing) == ([], [])
    assert report.reproduced.episodes == 14
    assert report.groups[0].verdict is ParityVerdict.AGREE


@pytest.mark.process
def test_a_controller_file_that_fails_in_replay_is_a_disagreement(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FOREIGN + "        1 / 0\n")
    spec = read(path)
    episode = replace(serve(QUESTIONS[0], Spec("mine", FOREIGN), 0.5, "r"), digest=spec.digest)
    assert check_parity(ServedRecords([episode], {}, {}), [spec]).decisions.disagreements == []
    path.write_text(FOREIGN.replace("        return [advance", "        state.nothing\n        return [advance"))
    spec = read(path)
    decisions = check_parity(ServedRecords([replace(episode, digest=spec.digest)], {}, {}), [spec]).decisions
    assert [(one.round, "AttributeError" in one.asked) for one in decisions.disagreements] == [(1, True)]


def test_episodes_with_missing_data_are_listed_as_unchecked() -> None:
    episode = consistent().episodes[0]
    about: Any = {key: value for key, value in episode.about.items() if key != "limits"}
    decisions = check_parity(
        ServedRecords([replace(episode, about=about), replace(episode, trace="")], {}, {})
    ).decisions
    assert [one.why for one in decisions.unchecked] == [
        "the limits of its episodes are unknown",
        "the rounds of its episodes are unknown",
    ]
    assert decisions.episodes == 0


def test_repeated_actions_are_formatted_with_a_count() -> None:
    text = format_actions([advance(0, TO_END), advance(1, 2), probe(1), probe(1), answer(None)])
    assert text == "advance(0, TO_END), advance(1, 2), 2 × probe(1), answer(None)"


# Too little, too few


def test_means_of_fewer_than_ten_questions_are_too_little_to_compare() -> None:
    report = check_parity(consistent(questions=QUESTIONS[:9]))
    (group,) = report.groups
    assert group.verdict is group.tokens.verdict is ParityVerdict.TOO_LITTLE
    assert report.holds
    (group,) = check_parity(consistent(questions=QUESTIONS[:1])).groups
    assert group.tokens.live.low is group.tokens.paired.low is None


def test_without_correct_answers_only_tokens_are_compared() -> None:
    (group,) = check_parity(replace(consistent(), references={})).groups
    assert (group.accuracy, group.tokens.verdict, group.verdict) == (
        None,
        ParityVerdict.AGREE,
        ParityVerdict.TOO_LITTLE,
    )


JUDGED_WRONG = frozenset({"r0", "r3", "r6", "r9", "r12"})


def judged(records: ServedRecords, source: LabelSource = LabelSource.FEEDBACK) -> ServedRecords:
    """Return the records as feedback of true or false labels them: only questions judged right have a label."""
    wrong = {one.question for one in records.episodes if one.request_id in JUDGED_WRONG}
    labels = {key: label._replace(source=source) for key, label in records.references.items() if key not in wrong}
    return replace(records, references=labels, judged_wrong=JUDGED_WRONG)


@pytest.mark.parametrize("source", [LabelSource.FEEDBACK, LabelSource.CONSENSUS])
def test_accuracy_is_not_compared_over_questions_that_feedback_chose_by_their_outcome(source: LabelSource) -> None:
    (group,) = check_parity(judged(consistent(), source)).groups
    assert (group.accuracy, group.judged_wrong, group.labels) == (None, 5, {})
    assert group.tokens.verdict is ParityVerdict.AGREE
    assert group.verdict is ParityVerdict.TOO_LITTLE


def test_beside_answers_judged_wrong_accuracy_counts_only_questions_with_a_reference() -> None:
    records = changed(consistent(), 0, answer="8")
    by_feedback = judged(records)
    (group,) = check_parity(replace(by_feedback, references={**by_feedback.references, **known(QUESTIONS[:4])})).groups
    assert (group.judged_wrong, group.labels) == (3, {"reference": 4})
    assert group.accuracy is not None
    assert (group.accuracy.live.mean, group.accuracy.live.questions, group.accuracy.paired.questions) == (75, 4, 4)


def test_answers_judged_wrong_whose_right_answer_is_known_count_as_wrong() -> None:
    records = changed(consistent(), 0, answer="8")
    corrected = {key: label._replace(source=LabelSource.FEEDBACK) for key, label in records.references.items()}
    (group,) = check_parity(replace(judged(records), references=corrected)).groups
    assert (group.judged_wrong, group.labels) == (0, {"feedback": 14})
    assert group.accuracy == check_parity(records).groups[0].accuracy


def test_replays_that_exhaust_their_recording_are_counted() -> None:
    narrow = [question(number, branches=4) for number in range(12)]
    records = consistent(Spec("asc@4"), 0.5, narrow)
    (group,) = check_parity(records).groups
    assert group.exhausted > 0
    (group,) = check_parity(consistent(Spec("asc@4"), 0.5)).groups
    assert group.exhausted == 0


# From a store


def stored(path: Path, records: ServedRecords, labels: Sequence[Label] = ()) -> ServedRecords:
    async def go() -> ServedRecords:
        async with Store.open(path) as store:
            await store.set_labels(labels)
            return await load_records(store)

    write(path, records.episodes, list(records.recordings.values()))
    return asyncio.run(go())


def test_records_loaded_from_a_store_pass_the_checks(tmp_path: Path) -> None:
    records = stored(tmp_path / "s.db", consistent())
    assert sorted(one.request_id for one in records.episodes) == sorted(records.recordings)
    (group,) = check_parity(records).groups
    assert (group.verdict, group.labels) == (ParityVerdict.AGREE, {"reference": 14})


@pytest.mark.parametrize("hide", [False, True])
def test_labels_of_the_store_grade_questions_without_a_reference(tmp_path: Path, hide: bool) -> None:
    unknown = [replace(one, reference=None) for one in QUESTIONS]
    records = consistent(questions=[_veiled(one) for one in unknown] if hide else unknown)
    partly = replace(records, recordings={key: records.recordings[key] for key in list(records.recordings)[:12]})
    labels = [
        *(Label(one.question, LabelSource.CONSENSUS, "8", 0.9) for one in unknown),
        *(Label(one.question, LabelSource.FEEDBACK, " 7.0 dollars ", 1) for one in unknown[:13]),
    ]
    report = check_parity(stored(tmp_path / "s.db", partly, labels))
    (group,) = report.groups
    assert group.labels == {"feedback": 13, "consensus": 1}
    assert (group.episodes, group.recorded) == (14, 12)
    assert group.accuracy is not None
    right = [one.answer == "7" for one in consistent().episodes]
    last = consistent().episodes[13].answer == "8"
    assert group.accuracy.live.mean == pytest.approx(100 * (sum(right[:13]) + last) / 14)
    assert group.accuracy.replayed.questions == 12
    assert not report.reproduced.differing


@pytest.mark.process
def test_the_parity_command_says_why_boolean_feedback_gives_no_accuracy(tmp_path: Path) -> None:
    unknown = consistent(questions=[replace(one, reference=None) for one in QUESTIONS])
    write(tmp_path / "s.db", unknown.episodes, list(unknown.recordings.values()))
    done = autotts("parity", "--store", "s.db", folder=tmp_path)
    assert "no correct answers known" in done.stdout
    assert "`autotts label` sets correct answers" in " ".join(done.stdout.split())

    async def judge() -> None:
        async with Store.open(tmp_path / "s.db") as store:
            await store.add_all(
                [
                    Feedback(one.id, one.request_id, "correct", json.dumps(one.request_id not in JUDGED_WRONG))
                    for one in unknown.episodes
                ]
            )

    asyncio.run(judge())
    assert autotts("label", "--store", "s.db", "--min-margin", "1", folder=tmp_path).returncode == 0
    done = autotts("parity", "--store", "s.db", "--json", "f.json", folder=tmp_path)
    (group,) = json.loads((tmp_path / "f.json").read_text())["means"]
    assert (done.returncode, group["accuracy"], group["judged_wrong"]) == (0, None, 5)
    assert "5 episodes judged wrong have no right answer" in " ".join(done.stdout.split())


def _veiled(recorded: RecordedQuestion) -> RecordedQuestion:
    def hidden(branch: RecordedBranch) -> RecordedBranch:
        probes = [None if one is None else redacted(one) for one in branch.probes]
        return branch._replace(probes=probes, final=None if branch.final is None else redacted(branch.final))

    return replace(recorded, branches=[hidden(branch) for branch in recorded.branches])


# The command


@pytest.mark.process
def test_the_parity_command_reports_writes_files_and_refuses_bad_arguments(tmp_path: Path) -> None:
    records, more = consistent(), consistent(SC, 0.5)
    episodes = [replace(one, id=f"s{one.id}", request_id=f"s{one.id}") for one in more.episodes]
    recordings = [replace(one, request=f"s{key}") for key, one in more.recordings.items()]
    write(tmp_path / "s.db", [*records.episodes, *episodes], [*records.recordings.values(), *recordings])
    done = autotts("parity", "--store", "s.db", "--plot", "p.svg", "--shuffles", "5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rounds of 28 episodes are decided the same" in done.stdout
    assert "reproduced: 28 of 28 recorded episodes match in tokens and answer" in done.stdout
    assert "correct answers from reference 14" in done.stdout
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    selection = ["--controller", "cmc", "--beta", "0.3"]
    done = autotts("parity", "--store", "s.db", *selection, "--json", "-", folder=tmp_path)
    body = json.loads(done.stdout)
    assert (body["holds"], body["decisions"]["episodes"]) == (True, 14)
    assert [(group["controller"], group["verdict"]) for group in body["means"]] == [("cmc", "agree")]
    for arguments, message in (
        (
            ["--controller", "asc"],
            "no episodes of that controller and β; the store has cmc at 0.3, self_consistency at 0.5",
        ),
        (["--beta", "0.9"], "no episodes of that controller and β"),
        (["--beta", "2"], "--beta must be a decimal number from 0 to 1"),
        (["--controllers", "none.py"], "none.py: No such file or directory"),
        (["--store", "none.db"], "none.db: there is no store"),
        (["--plot", "p.gif"], "must end in .png or .svg"),
    ):
        done = autotts("parity", "--store", "s.db", *arguments, folder=tmp_path)
        assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
        assert message in done.stderr


@pytest.mark.process
def test_the_parity_command_says_how_many_sampled_episodes_are_not_recorded_yet(tmp_path: Path) -> None:
    records = consistent()
    for at in range(14):
        records = changed(records, at, about={"sampled": True})
    write(tmp_path / "s.db", records.episodes, list(records.recordings.values())[:11])
    done = autotts("parity", "--store", "s.db", "--json", "f.json", "--shuffles", "2", folder=tmp_path)
    assert "3 sampled episodes are not recorded, or not yet" in done.stdout
    assert json.loads((tmp_path / "f.json").read_text())["unrecorded"] == 3
    assert check_parity(records, shuffles=2).unrecorded == 0


@pytest.mark.process
def test_the_parity_command_exits_with_1_on_a_disagreement(tmp_path: Path) -> None:
    records = consistent()
    records = changed(records, 2, about={"spent": 1})
    records = changed(records, 3, beta=1.0)
    write(tmp_path / "s.db", records.episodes, list(records.recordings.values()))
    done = autotts("parity", "--store", "s.db", "--json", "f.json", "--shuffles", "2", folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "8 × branch()" in done.stdout
    assert "episodes that differ" in done.stdout
    assert json.loads((tmp_path / "f.json").read_text())["holds"] is False


@pytest.mark.process
def test_the_parity_command_exits_with_3_when_nothing_could_be_checked(tmp_path: Path) -> None:
    odd = "\x9b31m\x7f\u202e"
    write(tmp_path / "s.db", [replace(serve(QUESTIONS[0], Spec(odd, FOREIGN), 0.5, "r"), model=odd)])
    for where in ("f.json", "-"):
        done = autotts("parity", "--store", "s.db", "--json", where, folder=tmp_path)
        assert done.returncode == 3, done.stderr
        assert not set(odd[:1] + odd[-2:]) & set(done.stdout)
    body = json.loads(done.stdout)
    assert (body["checked"], body["holds"], body["decisions"]["rounds"], body["means"]) == (False, False, 0, [])
    assert body["decisions"]["unchecked"][0]["controller"] == odd


@pytest.mark.process
def test_the_parity_command_explains_a_store_without_recordings_or_episodes(tmp_path: Path) -> None:
    write(tmp_path / "s.db", consistent().episodes)
    done = autotts("parity", "--store", "s.db", "--plot", "p.svg", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "set AUTOTTS_RECORD_FRACTION to have some completed" in done.stdout
    assert not (tmp_path / "p.svg").exists()
    write(tmp_path / "e.db", [])
    done = autotts("parity", "--store", "e.db", folder=tmp_path)
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "e.db: the store holds no served requests; record them with `autotts serve --store e.db`" in done.stderr
