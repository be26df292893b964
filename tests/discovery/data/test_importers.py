"""Readers of recordings: malformed files are refused with the record and the reason; written files are read back."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.data.importers import format_recording_line, read_jsonl, read_release, release_cell, release_files
from discovery.data.recordings import (
    Cell,
    LabelSource,
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    default_split,
    question_id,
)
from discovery.errors import BadRecording, RecordingsNotFound

RELEASED = {"question": "q", "gold_answer": "7", "probe_freq": 500, "each_branch": [[["1", "7"], 1200, "7"]]}
LINE = {
    "question": "q",
    "model": "m",
    "benchmark": "b",
    "interval": 500,
    "branches": [{"probes": ["1", None], "tokens": 1200, "final": "7", "probe_tokens": [9, 9]}],
}

SIGNALLED = {
    "probes": ["1"],
    "tokens": 700,
    "confidences": [900, 800],
    "lowests": [700, 600],
    "probe_confidences": [990],
}


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"each_branch": [[["1"], 1200]]}, "question 1: branch 0: not a list of three"),
        ({"each_branch": [7]}, "question 1: branch 0: not a list of three"),
        ({"each_branch": [[[1], 1200, "7"]]}, "branch 0: answers must be strings"),
        ({"each_branch": [[["1"], -3, "7"]]}, "branch 0: tokens is -3, not an integer"),
        ({"each_branch": [[["1"], True, "7"]]}, "branch 0: tokens is True, not an integer"),
        ({"each_branch": [[["1"], 2**31, "7"]]}, "tokens is 2147483648, not an integer"),
        ({"each_branch": []}, "no branches"),
        ({"each_branch": None}, "no branches"),
        ({"probe_freq": 0}, "probe_freq is 0"),
        ({"gold_answer": None}, "gold_answer is None, not a string"),
        ({"question": "first"}, "question 1: the same question as .*question 0"),
    ],
)
def test_a_malformed_release_is_refused_with_file_question_and_reason(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, "x.json", [RELEASED | {"question": "first"}, RELEASED | change])
    with pytest.raises(BadRecording, match=message) as caught:
        read_release(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_a_release_is_refused(tmp_path: Path) -> None:
    compressed = lzma.compress(json.dumps([RELEASED | {"question": str(i)} for i in range(50)]).encode())
    for name, content in (
        ("cut.json.xz", compressed[:-20]),
        ("no.json", b"{"),
        ("object.json", b"{}"),
        ("a.json", b"[1]"),
        ("nan.json", b"[NaN]"),
        ("latin.json", b"\xff"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRecording, match=name.split(".", maxsplit=1)[0]):
            read_release(tmp_path / name)
    with pytest.raises(BadRecording, match="has no 'gold_answer'"):
        read_release(write(tmp_path, "m.json", [{k: v for k, v in RELEASED.items() if k != "gold_answer"}]))
    (tmp_path / "good.json.xz").write_bytes(compressed)
    assert len(read_release(tmp_path / "good.json.xz")) == 50


def test_cells_of_a_release_are_named_by_its_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecordingsNotFound, match="no MODEL/BENCHMARK"):
        release_files(tmp_path)
    for model in ("a", "b"):
        (tmp_path / model).mkdir()
        for name in ("aime24.json", "aime25.json.xz", "notes.txt"):
            (tmp_path / model / name).touch()
    files = release_files(tmp_path)
    assert [release_cell(file) for file in files] == [
        Cell(model, benchmark, split)
        for model in ("a", "b")
        for benchmark, split in (("aime24", Split.SEARCH), ("aime25", Split.HELD_OUT))
    ]
    assert release_files(tmp_path / "a") == files[:2]
    assert release_files(files[3]) == [files[3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branches": []}, "branches: List should have at least 1 item"),
        ({"branches": [{"probes": [], "tokens": -1}]}, "branches.0.tokens: Input should be greater than"),
        ({"branches": [{"probes": [], "tokens": 1.5}]}, "branches.0.tokens: Input should be a valid integer"),
        (
            {"branches": [{"probes": [3], "tokens": 1}]},
            'branches.0.probes.0: Input should be a valid string, not 3; write "3"$',
        ),
        ({"branches": [{"probes": [], "tokens": "12"}]}, 'branches.0.tokens: Input should be .* integer, not "12"$'),
        ({"branches": [{"probes": [], "tokens": 1, "probe_tokens": [3]}]}, "1 probe_tokens for 0 probes"),
        (
            {"branches": [SIGNALLED | {"confidences": [900, 1001]}]},
            "branches.0.confidences.1: Input should be less than",
        ),
        ({"branches": [SIGNALLED | {"lowests": [-1, 80]}]}, "branches.0.lowests.0: Input should be greater than"),
        ({"branches": [SIGNALLED | {"lowests": [0.5, 80]}]}, "branches.0.lowests.0: Input should be a valid integer"),
        ({"branches": [SIGNALLED | {"confidences": [900]}]}, "1 confidences but 2 lowests; each interval needs both"),
        ({"branches": [SIGNALLED | {"confidences": [None, 800]}]}, "an interval has only one of confidence and lowest"),
        ({"branches": [SIGNALLED | {"probes": []}]}, "1 probe_confidences for 0 probes"),
        ({"branches": [SIGNALLED | {"confidences": [9] * 3, "lowests": [9] * 3}]}, "3 confidences for 1 probes"),
        (
            {"branches": [SIGNALLED | {"complete": False, "probes": ["1"] * 3, "probe_confidences": []}]},
            "2 confidences for 3 probes; a complete branch has one more than probes, and a censored branch",
        ),
        ({"branches": [SIGNALLED | {"confidence": [9]}]}, "there is no such field; .*confidences, lowests, probe_conf"),
        ({"interval": 0}, "interval: Input should be greater than"),
        ({"split": "test"}, "split: Input should be 'search', 'validation' or 'held-out'"),
        ({"question": None}, "question or id is needed"),
        ({"id": "0" * 64}, "id is not the SHA-256 of question"),
        ({"id": "7"}, "id: String should match pattern"),
        ({"reward": 1}, "reward: there is no such field; known fields: question, id, "),
        ({"branches": [{"prob": [], "tokens": 1}]}, "branches.0"),
        ({"confidence": 1.5}, "confidence: Input should be less than or equal to 1"),
        ({"part": -1}, "part: Input should be greater than or equal to 0"),
        ({"part": 3, "branches": [{"probes": [], "tokens": 1}] * 2}, "2 branches in a line that is part 3"),
        ({"question": "first"}, "the same question as .*x.jsonl:1"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number_and_reason(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lines = [LINE | {"question": "first"}, LINE | change]
    path = write(tmp_path, "x.jsonl", "\n\n".join(map(json.dumps, lines)))
    with pytest.raises(BadRecording, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_a_file_without_a_valid_line_is_refused(tmp_path: Path) -> None:
    for name, content in (("cut.jsonl", json.dumps(LINE)[:-5]), ("empty.jsonl", "\n"), ("list.jsonl", "[1]")):
        with pytest.raises(BadRecording, match=name):
            read_jsonl(write(tmp_path, name, content))
    with pytest.raises(BadRecording, match="No such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_a_line_without_a_split_gets_the_split_of_its_hash(tmp_path: Path) -> None:
    by_hash, explicit = read_jsonl(
        write(tmp_path, "x.jsonl", f"{json.dumps(LINE)}\n{json.dumps(LINE | {'question': 'p', 'split': 'held-out'})}")
    )
    assert by_hash.split is default_split(question_id("q"))
    assert explicit.split is Split.HELD_OUT


def test_default_splits_have_the_documented_sizes() -> None:
    splits = [default_split(question_id(str(i))) for i in range(10_000)]
    shares = [splits.count(split) / 10_000 for split in Split]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)


answers = st.none() | st.text(max_size=5)
counts = st.integers(0, 2**31 - 1)


confidences = st.none() | st.integers(0, 1000)


@st.composite
def branches(draw: st.DrawFn) -> RecordedBranch:
    probes, complete = draw(st.lists(answers, max_size=4)), draw(st.booleans())
    costs = draw(st.just([]) | st.lists(counts, min_size=len(probes), max_size=len(probes)))
    most = len(probes) + (1 if complete else 3)
    least = len(probes) + complete
    pairs = st.just((None, None)) | st.tuples(st.integers(0, 1000), st.integers(0, 1000))
    intervals = draw(st.just(()) | st.lists(pairs, min_size=least, max_size=most))
    sure = draw(st.just(()) | st.lists(confidences, min_size=len(probes), max_size=len(probes)))
    sure_of = [confidence for confidence, _ in intervals] or ()
    lowests = [lowest for _, lowest in intervals] or ()
    return RecordedBranch(probes, draw(counts), draw(answers), costs, complete, sure_of, lowests, sure or ())


recordings = st.builds(
    RecordedQuestion,
    question=st.text(max_size=9).map(question_id),
    model=st.text(min_size=1, max_size=5),
    benchmark=st.text(min_size=1, max_size=5),
    interval=st.integers(1, 9999),
    branches=st.lists(branches(), min_size=1, max_size=3),
    reference=answers,
    label_source=st.sampled_from(LabelSource),
    split=st.sampled_from(Split),
    sampling=st.dictionaries(st.text(max_size=3), st.integers() | st.floats(0, 2) | st.none(), max_size=2),
    probe_template=st.text(max_size=5),
    origin=st.sampled_from(Origin),
    chat_template=st.text(max_size=5),
    request=st.text(max_size=5),
    confidence=st.floats(0, 1),
).map(lambda drawn: drawn if drawn.reference is not None else replace(drawn, confidence=1.0))


@settings(deadline=None)
@given(recorded=recordings)
def test_a_written_line_is_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, recorded: RecordedQuestion
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_text(format_recording_line(recorded), encoding="utf-8")
    assert read_jsonl(path) == [recorded]


def test_a_line_keeps_signals_and_null_for_unknown_ones(tmp_path: Path) -> None:
    branch = SIGNALLED | {"confidences": [900, None], "lowests": [700, None], "probe_confidences": [None]}
    (recorded,) = read_jsonl(write(tmp_path, "x.jsonl", LINE | {"branches": [branch]}))
    assert recorded.branches[0][5:] == ([900, None], [700, None], [None])
    assert json.loads(format_recording_line(recorded))["branches"][0] == branch


@pytest.mark.parametrize("ending", ["", ".xz"])
def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path, ending: str) -> None:
    plain = write(tmp_path, "x.jsonl", LINE).read_bytes()
    marked = tmp_path / f"marked.jsonl{ending}"
    content = b"\xef\xbb\xbf" + plain
    marked.write_bytes(lzma.compress(content) if ending else content)
    assert read_jsonl(marked) == read_jsonl(tmp_path / "x.jsonl")


def test_a_line_without_signals_is_written_as_before(tmp_path: Path) -> None:
    (recorded,) = read_jsonl(write(tmp_path, "x.jsonl", LINE))
    assert not recorded.branches[0].has_signals
    assert json.loads(format_recording_line(recorded))["branches"] == LINE["branches"]


def test_a_written_line_omits_fields_with_default_values() -> None:
    recorded = RecordedQuestion(question_id("q"), "m", "b", 9, [RecordedBranch([], 3, "7", [])])
    fields = {"id", "model", "benchmark", "interval", "branches", "split"}
    assert set(json.loads(format_recording_line(recorded))) == fields
    assert set(json.loads(format_recording_line(recorded, part=0))) == fields | {"part"}


@settings(deadline=None)
@given(recorded=recordings, data=st.data())
def test_parts_of_a_recording_are_joined_in_order(
    tmp_path_factory: pytest.TempPathFactory, recorded: RecordedQuestion, data: st.DataObject
) -> None:
    """Parts may be interleaved with other recordings, repeated or missing."""
    parts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
    made = [replace(recorded, branches=[RecordedBranch(["1"], 9, str(at), [])]) for at in range(len(parts))]
    other = replace(recorded, interval=recorded.interval + 1)
    lines = [format_recording_line(one, part) for one, part in zip(made, parts, strict=True)]
    lines.insert(data.draw(st.integers(1, len(lines))), format_recording_line(other))
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    firsts = [made[parts.index(part)].branches[0] for part in sorted(set(parts))]
    assert read_jsonl(path) == [replace(recorded, branches=firsts), other]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"benchmark": "c"},
        {"interval": 10},
        {"sampling": {"temperature": 0.5}},
        {"probe_template": "p"},
        {"chat_template": "c"},
        {"request": "r"},
        {"question": question_id("p")},
    ],
)
def test_parts_of_different_recordings_are_not_joined(tmp_path: Path, change: dict[str, Any]) -> None:
    first = RecordedQuestion(question_id("q"), "m", "b", 9, [RecordedBranch([], 3, "7", [])], split=Split.SEARCH)
    second = replace(first, **change)
    path = write(tmp_path, "x.jsonl", format_recording_line(first, 0) + format_recording_line(second, 1))
    assert read_jsonl(path) == [first, second]
    assert read_jsonl(write(tmp_path, "y.jsonl", format_recording_line(first) + format_recording_line(second))) == [
        first,
        second,
    ]


def test_parts_and_a_complete_recording_of_one_question_are_refused_together(tmp_path: Path) -> None:
    recording = RecordedQuestion(question_id("q"), "m", "b", 9, [RecordedBranch([], 3, "7", [])])
    with pytest.raises(BadRecording, match=r"x.jsonl:2: the same question as .*x.jsonl:1"):
        read_jsonl(write(tmp_path, "x.jsonl", format_recording_line(recording) + format_recording_line(recording, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "8"}, "its reference is 8, but 7 in "),
        ({"reference": None, "confidence": 1.0}, "its reference is None, but 7 in "),
        ({"label_source": LabelSource.CONSENSUS}, "its label_source is consensus, but reference in "),
        ({"confidence": 0.5}, "its confidence is 0.5, but 1.0 in "),
        ({"split": Split.HELD_OUT}, "its split is held-out, but search in "),
    ],
)
def test_parts_that_disagree_about_their_question_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    recording = RecordedQuestion(
        question_id("q"), "m", "b", 9, [RecordedBranch([], 3, "7", [])], "7", split=Split.SEARCH
    )
    path = write(
        tmp_path,
        "x.jsonl",
        format_recording_line(recording, 0) + format_recording_line(replace(recording, text="q"), 1),
    )
    assert len(read_jsonl(path)[0].branches) == 2  # one line keeps the text, the other its hash
    write(
        tmp_path,
        "x.jsonl",
        format_recording_line(recording, 0)
        + format_recording_line(recording, 1)
        + format_recording_line(replace(recording, **change), 2),
    )
    with pytest.raises(BadRecording, match=f"x.jsonl:3: {message}.*x.jsonl:1"):
        read_jsonl(path)


def test_a_torn_last_line_is_ignored_only_in_a_file_of_parts(tmp_path: Path) -> None:
    recording = RecordedQuestion(question_id("q"), "m", "b", 9, [RecordedBranch([], 3, "é")], "é")
    parts = format_recording_line(recording, 0) + format_recording_line(recording, 1)
    torn = format_recording_line(recording, 2).encode()
    path = tmp_path / "x.jsonl"
    for length in range(len(torn)):
        path.write_bytes(parts.encode() + torn[:length])
        assert len(read_jsonl(path)[0].branches) == (3 if length == len(torn) - 1 else 2)
    path.write_bytes(parts.encode() + torn[:30] + b"\n")
    with pytest.raises(BadRecording, match=r"x.jsonl:3: Invalid JSON"):
        read_jsonl(path)
    path.write_bytes(format_recording_line(recording).encode() + torn[:30])
    with pytest.raises(BadRecording, match=r"x.jsonl:2: Invalid JSON"):
        read_jsonl(path)
    path.write_bytes(torn[:30])
    with pytest.raises(BadRecording, match=r"x.jsonl:1: Invalid JSON"):
        read_jsonl(path)
