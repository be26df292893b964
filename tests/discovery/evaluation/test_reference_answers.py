"""Labels from references, feedback and votes: how each is derived, which one counts, and how far they agree."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from discovery.answers import Judge, redacted
from discovery.data.questions import Question
from discovery.data.recordings import Cell, LabelSource, Origin, RecordedBranch, RecordedQuestion, Split, question_id
from discovery.evaluation.answer_votes import (
    MIN_CALIBRATION_ANSWERS,
    Agreement,
    AnswerFeedback,
    BranchVote,
    are_same_answer,
    calibrate_confidence,
    count_votes,
    estimated_confidence,
    label_by_feedback,
)
from discovery.evaluation.reference_answers import LabelReport, interpret_feedback, update_labels
from discovery.store import Feedback, Label, ServedEpisode, Store
from proxy.cli import app

REFERENCE, FEEDBACK, CONSENSUS = LabelSource
JUDGE = Judge()
"""A judge that starts no process, because the answers here need no comparison."""


def asked(text: str, reference: str | None = None) -> Question:
    return Question(messages=[{"role": "user", "content": text}], reference=reference)


def recorded(text: str, finals: str = "7778", **changes: Any) -> RecordedQuestion:
    """Return a live recording with one branch per letter of `finals`; `-` is a branch without an answer."""
    branches = [RecordedBranch([], 10, None if final == "-" else final) for final in finals]
    about: dict[str, Any] = {"model": "m", "benchmark": "live", "chat_template": "t", "request": f"r {text}"}
    about |= {"sampling": {"temperature": 0.6, "top_p": 0.9}}
    return RecordedQuestion(
        question_id(text), interval=100, branches=branches, **{"origin": Origin.LIVE, **about, **changes}
    )


def episode(request: str, text: str, answer: str | None = "7", **changes: Any) -> ServedEpisode:
    """Return the episode of a request. By default each request has its own tenant."""
    about: dict[str, Any] = {"answer": answer, "question": question_id(text), "tenant": f"of {request}"} | changes
    return ServedEpisode(request, request, "m", "cmc", "d", 0.5, 3, 4, {}, "answered", **about)


def feedback(request: str, value: Any, number: int = 0) -> Feedback:
    kind = {bool: "correct", str: "answer", float: "score"}[type(value)]
    created = f"2026-01-01T00:00:{number:02}"
    return Feedback(f"{request} {number}", request, kind, json.dumps(value), created)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "s.db"


def put(place: Path, *items: ServedEpisode | Feedback | RecordedQuestion) -> None:
    """Store items, adding episodes for live recordings that have none."""

    async def go() -> None:
        async with Store.open(place, create=True) as store:
            made_for = {one.request: one for one in items if isinstance(one, RecordedQuestion)}
            there = {one.request_id for one in items if isinstance(one, ServedEpisode)}
            known = {one.request_id for one in await store.episodes()} | there
            missing = [one for request, one in made_for.items() if request and request not in known]
            await store.add_all([*(replace(episode(one.request, ""), question=one.question) for one in missing)])
            await store.add_all(items)

    asyncio.run(go())


def filled(place: Path, *references: Question, **about: Any) -> LabelReport:
    async def go() -> LabelReport:
        async with Store.open(place) as store:
            return await update_labels(store, references, **about)

    return asyncio.run(go())


def labels(place: Path) -> list[Label]:
    async def go() -> list[Label]:
        async with Store.open(place) as store:
            return await store.labels()

    return asyncio.run(go())


def by_question(place: Path, source: LabelSource) -> dict[str, tuple[str, float]]:
    return {one.question: (one.answer, one.confidence) for one in labels(place) if one.source is source}


def read(place: Path, benchmark: str = "live", split: Split = Split.SEARCH) -> list[RecordedQuestion]:
    async def go() -> list[RecordedQuestion]:
        async with Store.open(place) as store:
            return await store.load(Cell("m", benchmark, split))

    return asyncio.run(go())


def sure(first: int, second: int) -> float:
    """Return the confidence of a vote whose branches give one of two answers."""
    return estimated_confidence(BranchVote("7", first, second, first + second))


# Feedback


@pytest.mark.parametrize(
    ("given", "kind", "value", "answer", "weight"),
    [
        ("7", "correct", "true", "7", 1.0),
        ("7", "correct", "false", "7", -1.0),
        ("7", "answer", '"8"', "8", 1.0),
        (None, "answer", '"8"', "8", 1.0),
        ("7", "score", "0.8", "7", 0.8),
        ("7", "score", "0.5", "7", 0.5),
        ("7", "score", "1", "7", 1.0),
        ("7", "score", "0.25", "7", -0.75),
        ("7", "score", "0", "7", -1.0),
    ],
)
def test_feedback_is_interpreted_by_kind(given: str | None, kind: str, value: str, answer: str, weight: float) -> None:
    feedback = interpret_feedback(episode("r", "q", given), Feedback("f", "r", kind, value))
    assert feedback == AnswerFeedback(question_id("q"), answer, weight, "of r")


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        (None, "correct", "true"),
        (None, "score", "0.1"),
        ("7", "correct", "1"),
        ("7", "answer", "8"),
        ("7", "score", "NaN"),
        ("7", "score", "7"),
        ("7", "score", "-0.1"),
        ("7", "mood", "true"),
        ("7", "correct", "tru"),
    ],
)
def test_feedback_without_an_answer_or_with_an_invalid_value_is_ignored(
    given: str | None, kind: str, value: str
) -> None:
    entry = Feedback("f", "r", kind, value)
    assert interpret_feedback(episode("r", "q", given), entry) is None
    assert interpret_feedback(None, entry) is None
    assert interpret_feedback(episode("r", "q", "7", question=None), Feedback("f", "r", "correct", "true")) is None


@pytest.mark.parametrize(
    ("kind", "value", "wrong"),
    [
        ("correct", "false", True),
        ("correct", "true", False),
        ("score", "0.25", True),
        ("score", "0.5", False),
        ("score", "-0.1", False),
        ("answer", '"8"', False),
        ("correct", "fals", False),
    ],
)
def test_feedback_judges_an_answer_wrong_by_false_or_a_low_score(kind: str, value: str, wrong: bool) -> None:
    assert (Feedback("f", "r", kind, value).rating < 0) is wrong


def label_of_votes(
    *feedback: tuple[str, float], tenants: Sequence[str] = "abcdefghi"
) -> tuple[str | None, float, list[str]]:
    outcome = label_by_feedback(
        [AnswerFeedback("q", *one, tenant) for one, tenant in zip(feedback, tenants, strict=False)], JUDGE
    )
    label = outcome.label
    return (
        (None, 0.0, list(outcome.refuted)) if label is None else (label.answer, label.confidence, list(outcome.refuted))
    )


@pytest.mark.parametrize(
    ("votes", "answer", "sure", "refuted"),
    [
        ([("7", 1.0)], "7", 2 / 3, []),
        ([("7", 0.8)], "7", 1.8 / 3, []),
        ([("7", -1.0)], None, 0.0, ["7"]),
        ([("7", -0.6)], None, 0.0, ["7"]),
        ([("7", 1.0), ("8", 1.0), (" 8.0", 1.0)], "8", 3 / 5, []),  # spellings are merged
        ([("7", 1.0), ("8", 1.0)], None, 0.0, []),
        ([("7", 1.0), ("8", 0.9)], "7", 2 / 4, []),
        ([("7", 1.0), ("7", -1.0)], None, 0.0, ["7"]),
        ([("7", 1.0), ("7", 1.0), ("7", 1.0), ("7", -1.0)], "7", 4 / 6, []),
        ([("7", 1.0), ("7", 0.5), ("7", -1.0), ("8", 0.6)], "8", 1.6 / 5, []),
        ([("8", -1.0), ("7", 1.0), ("7", 1.0)], "7", 3 / 4, ["8"]),  # refuting 8 is no vote on 7
        ([("7", 1.0), ("placeholder", 1.0)], "7", 2 / 3, []),
        ([("placeholder", 1.0)], None, 0.0, []),
        (
            [(redacted("7"), 1.0), ("7.0", 1.0), ("8", 1.0)],
            redacted("7"),
            3 / 5,
            [],
        ),  # redacted and plain spellings are merged
    ],
)
def test_the_label_of_feedback_is_the_best_supported_unrefuted_answer(
    votes: list[tuple[str, float]], answer: str | None, sure: float, refuted: list[str]
) -> None:
    result = label_of_votes(*votes)
    assert (result[0], result[2]) == (answer, refuted)
    assert result[1] == pytest.approx(sure)


@pytest.mark.parametrize(
    ("votes", "tenants", "answer", "sure", "refuted"),
    [
        ([("7", 1.0)] * 3 + [("8", 1.0)] * 2, "aaabc", "8", 3 / 5, []),  # repeating a vote does not count
        ([("7", 1.0), ("8", 1.0)], "aa", "8", 2 / 3, []),  # the tenant changed its vote
        ([("7", 1.0), ("7", -1.0)], "aa", None, 0.0, ["7"]),
        ([("7", -1.0), ("7.0", 1.0)], "aa", "7", 2 / 3, []),
        (
            [("7", -1.0), ("8", -1.0), ("9", 1.0)],
            "aaa",
            "9",
            2 / 3,
            ["7", "8"],
        ),  # one tenant may refute several answers
        ([("7", 1.0), ("8", -1.0), ("8", 1.0)], "aba", None, 0.0, ["8"]),
    ],
)
def test_each_tenant_has_one_vote_and_its_latest_counts(
    votes: list[tuple[str, float]], tenants: str, answer: str | None, sure: float, refuted: list[str]
) -> None:
    result = label_of_votes(*votes, tenants=tenants)
    assert (result[0], result[2]) == (answer, refuted)
    assert result[1] == pytest.approx(sure)


def test_text_that_starts_like_a_redacted_answer_is_ordinary_text() -> None:
    (begins, form) = "veiled:ten million", "veiled:" + 24 * "0"
    assert label_of_votes((begins, 1.0), (form, -1.0))[2] == [form]
    assert redacted(begins) != begins
    spelled = ["5", "5 cm", begins]  # a missing unit matches also beside other answers
    assert count_votes(spelled, JUDGE) == BranchVote("5", 2, 1, 3)


feedback_votes = st.lists(
    st.tuples(st.sampled_from("789"), st.sampled_from([-1.0, -0.75, -0.5, 0.5, 0.75, 1.0])), min_size=1, max_size=9
)


@pytest.mark.slow
@given(feedback_votes, st.randoms())
def test_a_refuted_answer_is_never_a_label(votes: list[tuple[str, float]], random: Any) -> None:
    answer, sure, refuted = label_of_votes(*votes)
    support = {one: sum(weight for what, weight in votes if what == one) for one in "789"}
    assert set(refuted) == {one for one in support if support[one] <= 0 and one in dict(votes)}
    if answer is not None:
        assert support[answer] > max(0, *(support[one] for one in support if one != answer))
        assert 0 < sure < 1
    shuffled = list(votes)
    random.shuffle(shuffled)
    again = label_of_votes(*shuffled)
    assert (again[0], again[1], set(again[2])) == (answer, sure, set(refuted))


# Votes


def voted(finals: str) -> BranchVote | None:
    return count_votes([None if final == "-" else final for final in finals], JUDGE)


def test_a_vote_counts_all_branches_including_those_without_an_answer() -> None:
    assert voted("77787") == BranchVote("7", 4, 1, 5)
    assert voted("787--") == BranchVote("7", 2, 1, 5)
    assert voted("787--").margin == 0.2  # type: ignore[union-attr]
    assert voted("77") is None
    assert voted("7--") == BranchVote("7", 1, 0, 3)
    assert voted("---") is None
    assert voted("8778") == BranchVote("8", 2, 2, 4)


def test_equal_answers_in_different_spellings_share_votes() -> None:
    spelled = ["7.0", "$8$", "007", "8", "7", "[placeholder]"]
    assert count_votes(spelled, JUDGE) == BranchVote("7.0", 3, 2, 6)
    assert count_votes([*spelled, "8", "007", "007", "$8$"], JUDGE) == BranchVote(
        "007", 5, 4, 10
    )  # the most common spelling
    assert count_votes([redacted(one) for one in spelled[:5]], JUDGE) == BranchVote(redacted("7"), 3, 2, 5)
    assert are_same_answer("7.0", redacted("7"), JUDGE)
    assert not are_same_answer("8", redacted("7"), JUDGE)
    assert not are_same_answer("[placeholder]", "[placeholder]", JUDGE)


def test_the_confidence_of_a_vote_is_bounded_by_its_share() -> None:
    assert sure(3, 0) == 15 / 16 * 4 / 5  # 1 - BetaCDF(1/2; 4, 1)
    assert sure(60, 40) == pytest.approx(0.6, abs=0.02)
    assert estimated_confidence(BranchVote("7", 3, 0, 6)) == 15 / 16 * 4 / 8
    assert sure(2, 2) == 1 / 4
    assert sure(64, 0) == pytest.approx(65 / 66)  # never certain


estimates = st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9])


@given(st.lists(st.tuples(estimates, st.booleans()), min_size=MIN_CALIBRATION_ANSWERS, max_size=60))
def test_calibrated_confidence_is_monotone_and_each_step_matches_its_own_answers(
    judged: list[tuple[float, bool]],
) -> None:
    sure = calibrate_confidence(judged)
    levels = sorted({level for level, _ in judged})
    confidences = [sure(level) for level in levels]
    assert confidences == sorted(confidences)
    for share in set(confidences):
        own = [is_right for level, is_right in judged if sure(level) == share]
        assert share == (sum(own) + 1) / (len(own) + 2)
    assert (sure(0.0), sure(1.0)) == (confidences[0], confidences[-1])
    assert sure((levels[0] + levels[-1]) / 2) in confidences


def test_calibration_needs_a_minimum_number_of_answers_and_one_answer_moves_it_little() -> None:
    half = [(0.5, number % 2 == 0) for number in range(MIN_CALIBRATION_ANSWERS)]
    assert calibrate_confidence([*half, (0.9, True)])(0.95) == 2 / 3
    assert calibrate_confidence([*half, (0.9, False)])(0.95) == pytest.approx(11 / 23)  # all answers form one step
    assert calibrate_confidence([(0.9, True)] * MIN_CALIBRATION_ANSWERS)(0.1) == 21 / 22
    assert calibrate_confidence(half[1:])(0.95) == 0.95  # too few to calibrate


@pytest.mark.parametrize(("right", "of"), [(0, 4), (4, 4), (46, 56), (1, 2)])
def test_the_interval_of_an_agreement_is_the_wilson_interval(right: int, of: int) -> None:
    interval = Agreement(right, of).interval
    assert interval is not None
    for end in (one / 100 for one in interval):  # each end solves Wilson's equation
        assert abs(end - right / of) == pytest.approx(1.959964 * (end * (1 - end) / of) ** 0.5, abs=1e-6)
    assert interval[0] <= 100 * right / of <= interval[1]
    assert Agreement(0, 0).interval is None


# A store


def test_references_override_feedback_which_overrides_consensus(place: Path) -> None:
    put(place, recorded("q", "8888"))
    assert read(place)[0].reference is None
    filled(place)
    (recording,) = read(place)
    assert (recording.reference, recording.label_source, recording.confidence) == ("8", CONSENSUS, sure(4, 0))
    put(place, feedback("r q", "9"))
    filled(place)
    (recording,) = read(place)
    assert (recording.reference, recording.label_source, recording.confidence) == ("9", FEEDBACK, 2 / 3)
    filled(place, asked("q", "7"))
    (recording,) = read(place)
    assert (recording.reference, recording.label_source, recording.confidence) == ("7", REFERENCE, 1)
    report = filled(place)
    assert report.effective == {REFERENCE: 1, FEEDBACK: 0, CONSENSUS: 0, None: 0}
    assert (report.feedback, report.consensus) == (Agreement(0, 1), Agreement(0, 1))
    assert {one.source: one.answer for one in labels(place)} == {REFERENCE: "7", FEEDBACK: "9", CONSENSUS: "8"}


def test_updating_labels_twice_writes_nothing_the_second_time(place: Path) -> None:
    put(place, recorded("q"), recorded("p", "9999"), feedback("r q", 0.8), episode("s", "p"), feedback("s", False))

    async def go() -> None:
        async with Store.open(place) as store:
            first = await update_labels(store, [asked("p", "9")])
            before, count = await store.labels(), store.transactions
            second = await update_labels(store, [asked("p", "9")])
            assert await store.labels() == before  # including timestamps
            assert store.transactions == count
            assert first.written == {REFERENCE: 1, FEEDBACK: 1, CONSENSUS: 2}
            assert replace(second, written=first.written) == first
            assert set(second.written.values()) == {0}

    asyncio.run(go())


def test_the_latest_feedback_of_a_request_replaces_the_label_of_earlier_feedback(place: Path) -> None:
    put(place, episode("r", "q"), feedback("r", True, 1))
    filled(place)
    assert by_question(place, FEEDBACK) == {question_id("q"): ("7", 2 / 3)}
    put(place, feedback("r", 0.6, 2))
    filled(place)
    assert by_question(place, FEEDBACK) == {question_id("q"): ("7", 1.6 / 3)}
    put(place, feedback("r", False, 3))
    report = filled(place)
    assert labels(place) == []
    assert (report.removed[FEEDBACK], report.effective[None]) == (1, 1)


def test_forgotten_data_gives_no_labels(place: Path) -> None:
    put(place, recorded("q", "78"), episode("s", "q"), feedback("s", True))
    filled(place)

    async def forget() -> None:
        async with Store.open(place) as store:
            await store.forget(request="s")

    asyncio.run(forget())
    filled(place)
    assert labels(place) == []


def test_a_refuted_answer_gives_no_consensus_label(place: Path) -> None:
    put(place, recorded("q", "7777"), recorded("p", "7777"), feedback("r q", False), feedback("r p", True))
    report = filled(place)
    assert by_question(place, CONSENSUS) == {question_id("p"): ("7", sure(4, 0))}
    assert (report.votes, report.close, report.refuted) == (2, 0, 1)
    put(place, episode("s", "q"), episode("t", "q"), feedback("s", True), feedback("t", True))
    assert filled(place).refuted == 0  # two votes for it, one against


def test_a_close_or_small_vote_gives_no_label(place: Path) -> None:
    finals = {"even": "7788", "near": "7" * 55 + "8" * 45, "clear": "7778", "small": "77", "silent": "----"}
    put(place, *(recorded(text, said) for text, said in finals.items()))
    report = filled(place)
    assert set(by_question(place, CONSENSUS)) == {question_id("clear")}
    assert (report.votes, report.close) == (3, 2)
    filled(place, min_margin=0.1)
    assert set(by_question(place, CONSENSUS)) == {question_id("clear"), question_id("near")}
    filled(place, min_margin=0.0)  # a tie has no leader
    assert set(by_question(place, CONSENSUS)) == {question_id("clear"), question_id("near")}
    assert filled(place, min_margin=0.9).removed[CONSENSUS] == 2
    assert labels(place) == []


def test_votes_use_only_the_newest_version_and_complete_recordings(place: Path) -> None:
    cut = recorded("q", "5555", request="r 3")
    cut = replace(cut, branches=[cut.branches[0]._replace(complete=False), *cut.branches[1:]])
    put(
        place,
        recorded("q", "8888888", request="r 1", chat_template="old"),
        recorded("q", "76", request="r 4", benchmark="asked again"),
        recorded(
            "p", "888", request="r 5", chat_template="old", benchmark="asked again"
        ),  # newest in its cell, but not overall
        recorded("q", "777", request="r 2"),
        cut,
    )
    report = filled(place)
    assert by_question(place, CONSENSUS) == {
        question_id("q"): ("7", sure(4, 1)),  # both benchmarks are pooled
        question_id("p"): ("8", sure(3, 0)),  # its newest version
    }
    assert report.votes == 2


def test_the_greedy_branch_of_several_requests_has_one_vote(place: Path) -> None:
    greedy = {"sampling": {"temperature": 0}}
    put(place, *(recorded("q", f"8{final}", request=f"r {at}", **greedy) for at, final in enumerate("7787")))
    filled(place)
    assert by_question(place, CONSENSUS) == {question_id("q"): ("7", sure(3, 2))}


def test_versions_read_from_the_store_equal_those_of_its_recordings(place: Path) -> None:
    both = [recorded("q", chat_template="old"), recorded("q", sampling={"top_p": 0.9, "ü": [1, 2]}, request="r 2")]
    put(place, *both)

    async def versions() -> list[Any]:
        async with Store.open(place) as store:
            return list(await store.versions("m"))

    assert asyncio.run(versions()) == [both[1].version, both[0].version]


def test_of_several_models_the_most_confident_vote_counts(place: Path) -> None:
    put(place, recorded("q", "88887777777", model="n", request="r 1"), recorded("q", "999", request="r 2"))
    filled(place)
    assert by_question(place, CONSENSUS) == {question_id("q"): ("9", sure(3, 0))}


def test_a_large_vote_is_preferred_to_a_small_unanimous_one(place: Path) -> None:
    put(place, recorded("q", "7" * 62 + "88", model="n", request="r 1"), recorded("q", "999", request="r 2"))
    filled(place)
    assert by_question(place, CONSENSUS) == {question_id("q"): ("7", sure(62, 2))}


def test_the_minimum_number_of_voting_branches_can_be_configured(place: Path) -> None:
    put(place, recorded("q", "77"), recorded("p", "7777"))
    assert filled(place).votes == 1
    assert filled(place, min_branches=2).votes == 2
    report = filled(place, min_branches=5)
    assert (report.votes, report.removed[CONSENSUS]) == (0, 2)


def test_feedback_confidence_is_calibrated_on_enough_references(place: Path) -> None:
    known = [f"known {number}" for number in range(MIN_CALIBRATION_ANSWERS)]
    put(place, *(item for text in [*known, "q"] for item in (episode(text, text), feedback(text, True))))
    references = [
        asked(text, "7" if number < MIN_CALIBRATION_ANSWERS // 4 else "8") for number, text in enumerate(known)
    ]
    assert filled(place, *references[1:]).as_json()["feedback"]["confidence"] == "reckoned"
    assert by_question(place, FEEDBACK)[question_id("q")] == ("7", 2 / 3)
    report = filled(place, *references)
    assert report.as_json()["feedback"]["confidence"] == "calibrated"
    assert by_question(place, FEEDBACK)[question_id("q")] == (
        "7",
        (MIN_CALIBRATION_ANSWERS // 4 + 1) / (MIN_CALIBRATION_ANSWERS + 2),
    )


@pytest.mark.parametrize(("source", "finals"), [(CONSENSUS, "7" * 64), (FEEDBACK, "78")])
def test_an_imported_label_can_be_refuted_by_feedback(tmp_path: Path, source: LabelSource, finals: str) -> None:
    there, here = tmp_path / "there.db", tmp_path / "here.db"
    put(there, recorded("q", finals), *([feedback("r q", "7")] if source is FEEDBACK else []))
    filled(there)
    (exported,) = read(there)
    assert (exported.reference, exported.label_source) == ("7", source)
    for sent in (exported, replace(exported, confidence=1.0)):  # confidence 1 as an older version wrote it
        here.unlink(missing_ok=True)
        put(here, sent, feedback("r q", "8"))
        assert by_question(here, source)[question_id("q")][0] == "7"
        put(here, feedback("r q", "9", 1))  # no vote on 7
        filled(here)
        put(here, episode("s", "q"), feedback("s", False, 2))
        filled(here)
        assert "7" not in {one.answer for one in labels(here)}
        assert read(here)[0].reference == "9"


def test_the_latest_vote_of_a_tenant_counts_across_its_requests(place: Path) -> None:
    put(place, episode("r", "q", tenant="a"), episode("s", "q", tenant="a"))
    put(place, feedback("r", "7", 1), feedback("s", "8", 2), feedback("r", "9", 3))
    filled(place)
    assert by_question(place, FEEDBACK) == {question_id("q"): ("9", 2 / 3)}


def test_consensus_confidence_is_calibrated_on_enough_references(place: Path) -> None:
    known = [f"known {number}" for number in range(MIN_CALIBRATION_ANSWERS)]
    put(place, recorded("q", "7777"), *(recorded(text, "7777") for text in known))
    references = [
        asked(text, "7" if number < MIN_CALIBRATION_ANSWERS // 2 else "8") for number, text in enumerate(known)
    ]
    report = filled(place, *references[1:])
    assert report.calibrated == 0
    assert by_question(place, CONSENSUS)[question_id("q")] == ("7", sure(4, 0))
    report = filled(place, *references)
    assert report.calibrated == MIN_CALIBRATION_ANSWERS
    assert by_question(place, CONSENSUS)[question_id("q")] == ("7", 0.5)
    assert report.consensus == Agreement(MIN_CALIBRATION_ANSWERS // 2, MIN_CALIBRATION_ANSWERS)
    assert [(low, high, found) for low, high, found in report.by_margin if found.of] == [
        (0.8, 1.0, Agreement(MIN_CALIBRATION_ANSWERS // 2, MIN_CALIBRATION_ANSWERS))
    ]


def test_agreement_is_binned_by_margin_with_inclusive_lower_ends(place: Path) -> None:
    finals = {"0.0": "78787-", "0.2": "7778899999", "0.8": "777777777-" + "8" * 1, "1.0": "777"}
    put(place, *(recorded(text, said) for text, said in finals.items()))
    report = filled(place, *(asked(text, "7") for text in finals))
    margins = {text: voted(said).margin for text, said in finals.items()}  # type: ignore[union-attr]
    assert margins == pytest.approx({"0.0": 1 / 6, "0.2": 0.2, "0.8": 8 / 11, "1.0": 1})
    assert {low: tuple(found) for low, _, found in report.by_margin} == {
        0.0: (1, 1),
        0.2: (0, 1),
        0.4: (0, 0),
        0.6: (1, 1),
        0.8: (1, 1),
    }
    assert report.consensus == Agreement(2, 3)


def test_references_apply_to_stored_questions_and_never_override_a_recordings_own(place: Path) -> None:
    own = recorded("own", reference="7", request="", chat_template="", origin=Origin.COLLECTED)
    put(place, own, recorded("q"), episode("s", "served"))
    given = [asked("own", "8"), asked("q", "5"), asked("served", "6"), asked("other", "1"), asked("no reference")]
    report = filled(place, *given)
    assert by_question(place, REFERENCE) == {question_id("q"): ("5", 1.0), question_id("served"): ("6", 1.0)}
    assert (report.unknown, report.contradicted) == (1, 1)
    assert report.effective == {REFERENCE: 3, FEEDBACK: 0, CONSENSUS: 0, None: 0}
    assert report.consensus == Agreement(1, 2)  # the recording's own reference counts for "own"
    assert filled(place, asked("own", "7.0")).contradicted == 0
    assert filled(place, asked("q", "4")).written[REFERENCE] == 1
    assert by_question(place, REFERENCE)[question_id("q")] == ("4", 1.0)


def test_imported_labels_stay_until_local_data_gives_new_ones(place: Path) -> None:
    put(place, recorded("q", "78"))

    async def came() -> None:
        async with Store.open(place) as store:
            await store.set_labels([Label(question_id("q"), source, "7", 0.9) for source in (FEEDBACK, CONSENSUS)])

    asyncio.run(came())
    assert set(filled(place).removed.values()) == {0}
    assert len(labels(place)) == 2
    put(place, recorded("q", "888", request="r 2"), feedback("r q", "9"))
    filled(place)
    assert by_question(place, FEEDBACK) == {question_id("q"): ("9", 2 / 3)}
    assert by_question(place, CONSENSUS) == {question_id("q"): ("8", sure(4, 1))}


def test_redacted_answers_are_counted_in_votes_and_feedback(place: Path) -> None:
    hidden = recorded("q", "7778")
    hidden = replace(hidden, branches=[one._replace(final=redacted(one.final or "")) for one in hidden.branches])
    put(place, hidden, replace(hidden, question=question_id("p"), request="r p"), feedback("r p", redacted("8")))
    report = filled(place, asked("q", "7.0"), asked("p", "8"))
    assert report.consensus == Agreement(1, 2)
    assert report.feedback == Agreement(1, 1)
    assert by_question(place, CONSENSUS)[question_id("p")] == (redacted("7"), sure(3, 1))
    assert by_question(place, FEEDBACK) == {question_id("p"): (redacted("8"), 2 / 3)}


# The command


def run(place: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["label", "--store", str(place), *arguments])


@pytest.fixture
def asking(tmp_path: Path) -> Path:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "q", "reference": "7"}\n{"question": "other", "reference": "7"}\n')
    return path


def test_the_label_command_prints_text_and_json(place: Path, asking: Path, tmp_path: Path) -> None:
    put(place, recorded("q"), recorded("p", "8888"), episode("s", "p", None), feedback("s", True))
    done = run(place, "--references", str(asking), "--json", str(tmp_path / "f.json"))
    assert done.exit_code == 0, done.output
    for text in ("1 of 1", "21 to 100 %", "of 2 votes 0 are too close", "vote counts alone", "1 belong to questions"):
        assert text in done.output
    assert "for 1 requests it concerns no known answer" in done.output
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["questions"] == {"reference": 1, "feedback": 0, "consensus": 1, "none": 0}
    assert figures["written"] == {"reference": 1, "feedback": 0, "consensus": 2}
    assert figures["consensus"]["agreement"]["right"] == figures["consensus"]["agreement"]["of"] == 1
    assert figures["consensus"]["by_margin"][2] == {"from": 0.4, "to": 0.6} | figures["consensus"]["agreement"]
    done = run(place, "--references", str(asking), "--json", "-")
    assert json.loads(done.stdout) == figures | {"written": {"reference": 0, "feedback": 0, "consensus": 0}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--references", "none.jsonl"], "none.jsonl: No such file"),
        (["--json", "no/f.json"], "there is no folder"),
        (["--min-margin", "2"], "Invalid value for '--min-margin'"),
        (["--min-branches", "0"], "Invalid value for '--min-branches'"),
        (["--store", "none.db"], "none.db: there is no store"),
    ],
)
def test_invalid_arguments_of_label_write_nothing(place: Path, arguments: list[str], message: str) -> None:
    put(place, recorded("q"))
    done = run(place, *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert labels(place) == []
