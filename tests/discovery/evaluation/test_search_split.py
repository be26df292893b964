"""The export for explorers: only the search split, with every readable text removed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from discovery.answers import redacted
from discovery.data.importers import format_recording_line, read_jsonl
from discovery.data.recordings import Cell, LabelSource, Origin, RecordedBranch, RecordedQuestion, Split, question_id
from discovery.errors import DiscoveryError, RecordingsNotFound
from discovery.evaluation.evaluate import AnswerComparison
from discovery.evaluation.scores import Score
from discovery.evaluation.search_split import export_search_split, salted_id, search_split_of
from discovery.evaluation.sources import open_source
from tests.discovery.evaluation.test_evaluate import Given, question, scores

ANSWER_WORDS = {str(number): f"answer-number-{'x' * number}!" for number in range(7)}


def worded(number: int, **changes: Any) -> RecordedQuestion:
    """Return a question whose answers are words that occur nowhere else in a recording."""
    text = f"What is the meaning of {number}?"
    plain = question(number, **changes)

    def word(answer: str | None) -> str | None:
        return None if answer in (None, "11") else ANSWER_WORDS.get(answer or "", f"seven+{answer}")

    branches = [
        RecordedBranch([word(one) for one in b.probes], b.tokens, word(b.final), list(b.probe_tokens))
        for b in plain.branches
    ]
    reference = None if plain.reference is None else word(plain.reference)
    return replace(plain, question=question_id(text), text=text, branches=branches, reference=reference)


QUESTIONS = (
    *(worded(i) for i in range(6)),
    worded(6, reference="99"),  # no branch gives this answer
    worded(7, reference=None),
    worded(8, split=Split.VALIDATION),
    worded(9, split=Split.HELD_OUT),
    *(worded(i, benchmark="c") for i in range(10, 13)),
)


def written(path: Path, questions: Sequence[RecordedQuestion] = QUESTIONS) -> Path:
    path.write_text("".join(format_recording_line(one) for one in questions))
    return path


def test_only_the_search_split_is_listed_and_can_be_loaded() -> None:
    source = search_split_of(Given(*QUESTIONS))
    assert source.cells() == [Cell("m", "b", Split.SEARCH), Cell("m", "c", Split.SEARCH)]
    assert len(source.load(source.cells()[0])) == 8
    for split in (Split.VALIDATION, Split.HELD_OUT):
        with pytest.raises(DiscoveryError, match=f"m b {split}: explorers may read only the search split"):
            source.load(Cell("m", "b", split))


def columns(measured: Sequence[Score]) -> list[Any]:
    return [(score.cell, score.beta, score.outcomes.tolist()) for score in measured]


@pytest.mark.parametrize("controller", ["cmc", "asc@16"])
def test_the_export_gives_the_same_scores_as_the_original(tmp_path: Path, controller: str) -> None:
    path = written(tmp_path / "all.jsonl")
    assert export_search_split(path, tmp_path / "search.jsonl") == 11
    both = [search_split_of(open_source(one)) for one in (path, tmp_path / "search.jsonl")]
    original, exported = (
        scores(controller, source=Given(*(q for c in opened.cells() for q in opened.load(c)))) for opened in both
    )
    assert columns(exported) == columns(original)
    assert sum(score.accuracy for score in original) > 0


def test_the_export_contains_no_question_answer_or_id(tmp_path: Path) -> None:
    export_search_split(written(tmp_path / "all.jsonl"), tmp_path / "search.jsonl")
    text = (tmp_path / "search.jsonl").read_text()
    for recorded in QUESTIONS:
        answers = {answer for branch in recorded.branches for answer in (*branch.probes, branch.final)}
        for word in (recorded.question, recorded.question[:12], recorded.text, recorded.reference, *answers):
            assert word is None or word not in text
    assert "held-out" not in text
    assert "meaning" not in text
    for line in map(json.loads, text.splitlines()):
        answers_in_line = [
            line.get("reference"),
            *(a for b in line["branches"] for a in (*b["probes"], b.get("final"))),
        ]
        assert all(answer is None or (answer[0] == "a" and answer[1:].isdigit()) for answer in answers_in_line)
        assert "question" not in line


def test_answer_numbers_in_the_export_do_not_reveal_their_order(tmp_path: Path) -> None:
    export_search_split(written(tmp_path / "all.jsonl"), tmp_path / "search.jsonl")
    exported = read_jsonl(tmp_path / "search.jsonl")
    assert len({one.branches[0].final for one in exported}) > 1
    assert len({one.reference for one in exported}) > 2


def test_one_salt_gives_the_same_export_and_no_salt_a_different_one(tmp_path: Path) -> None:
    path = written(tmp_path / "all.jsonl")
    texts = []
    for salt in ("s", "s", None, None):
        export_search_split(path, tmp_path / "search.jsonl", salt)
        texts.append((tmp_path / "search.jsonl").read_text())
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert salted_id(QUESTIONS[0].question, "s") in texts[0]


def test_canonically_equal_answers_get_one_number_in_the_export(tmp_path: Path) -> None:
    chains = [RecordedBranch([], 10, answer, []) for answer in ("7.0", "007", "8", "$7$", "8")]
    given = RecordedQuestion(question_id("q"), "m", "b", 100, chains, " 7 ")
    export_search_split(
        written(tmp_path / "all.jsonl", [given]), tmp_path / "search.jsonl", answers=AnswerComparison.CANONICAL
    )
    (exported,) = read_jsonl(tmp_path / "search.jsonl")
    finals = [branch.final for branch in exported.branches]
    assert finals[0] == finals[1] == finals[3] == exported.reference
    assert finals[2] == finals[4] != finals[0]


def hidden(recorded: RecordedQuestion) -> RecordedQuestion:
    """Return the recording as one of a live request whose text may not be stored."""
    branches = [
        branch._replace(
            probes=[None if answer is None else redacted(answer) for answer in branch.probes],
            final=None if branch.final is None else redacted(branch.final),
        )
        for branch in recorded.branches
    ]
    return replace(recorded, branches=branches, text=None, origin=Origin.LIVE, request=f"request {recorded.question}")


@pytest.mark.parametrize("answers", AnswerComparison)
def test_the_export_of_live_recordings_gives_the_same_scores_and_names_no_request(
    tmp_path: Path, answers: AnswerComparison
) -> None:
    live = [replace(hidden(one), label_source=LabelSource.FEEDBACK, confidence=0.5) for one in QUESTIONS[:6]]
    again = [replace(one, request=f"{one.request} again", branches=one.branches[::-1]) for one in live]
    path = written(tmp_path / "all.jsonl", [*live, *again])
    assert export_search_split(path, tmp_path / "search.jsonl", answers=answers) == 6
    exported = read_jsonl(tmp_path / "search.jsonl")
    assert columns(scores("cmc", source=Given(*exported))) == columns(
        scores("cmc", source=Given(*live, *again), answers=answers)
    )
    assert sum(score.accuracy for score in scores("cmc", source=Given(*exported))) > 0
    assert {(one.label_source, one.confidence) for one in exported} == {(LabelSource.FEEDBACK, 0.5)}
    assert {len(one.branches) for one in exported} == {32}
    text = (tmp_path / "search.jsonl").read_text()
    assert not any(one.request in text or one.question in text for one in (*live, *again))
    assert "veiled" not in text


def test_nothing_to_export_leaves_no_file(tmp_path: Path) -> None:
    path = written(tmp_path / "all.jsonl", QUESTIONS[8:10])
    with pytest.raises(RecordingsNotFound, match="holds no recordings of the search split"):
        export_search_split(path, tmp_path / "search.jsonl")
    assert list(tmp_path.iterdir()) == [path]


def test_the_export_keeps_signals(tmp_path: Path) -> None:
    recorded = worded(20, split=Split.SEARCH)
    branches = [
        branch._replace(
            confidences=[900 - number] * (len(branch.probes) + 1),
            lowests=[800] * (len(branch.probes) + 1),
            probe_confidences=[None] * len(branch.probes) or (),
        )
        for number, branch in enumerate(recorded.branches)
    ]
    path = written(tmp_path / "all.jsonl", [replace(recorded, branches=branches)])
    assert export_search_split(path, tmp_path / "search.jsonl") == 1
    (exported,) = read_jsonl(tmp_path / "search.jsonl")
    assert [branch[5:] for branch in exported.branches] == [branch[5:] for branch in branches]
