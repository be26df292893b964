"""Bounds on the work of reading an answer, whatever a model or a client writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from discovery.answers import canonical, canonical_answer, extraction, parse_kind, read_answer
from discovery.answers.form_parser import DEEPEST, MOST_PARTS, FormParser
from discovery.answers.latex import normalize_latex


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the parts of answers that are parsed while a test runs."""
    seen: list[str] = []
    plain = FormParser._read

    def counted(self: FormParser, text: str) -> Any:
        seen.append(text)
        return plain(self, text)

    monkeypatch.setattr(FormParser, "_read", counted)
    canonical.cache_clear()
    return seen


NESTED = ["x=1=({})", "(1<x<({}))", "a or ({})", "x<({}) or q q", "(1, {})", "\\{{1, x={}\\}}", "|AB|=1=({})"]


@pytest.mark.parametrize("around", NESTED)
def test_steps_to_read_a_nested_answer_grow_linearly_with_its_depth(around: str, parts: list[str]) -> None:
    counts = []
    for depth in (4, 8, 16):
        text = "1"
        for _ in range(depth):
            text = around.format(text)
        parts.clear()
        canonical(text)
        counts.append(len(parts))
        assert len(parts) <= MOST_PARTS
    assert counts[2] <= 5 * max(1, counts[0])  # four times as deep


def test_an_answer_that_is_too_deep_or_has_too_many_parts_is_not_read(parts: list[str]) -> None:
    deep = "1"
    for _ in range(DEEPEST + 1):
        deep = f"(1, {deep})"
    assert canonical(deep) is None
    names = [f"{letter}{digit}" for letter in "abcdfghjklmnopqrstuvwxyzABC" for digit in range(10)]
    assert canonical(",".join(names[: MOST_PARTS + 1])) is None
    assert len(parts) <= 2 * MOST_PARTS + DEEPEST
    assert canonical(",".join(names[: MOST_PARTS - 1])) is not None


@pytest.mark.parametrize("space", [" ", "~", "\\ ", "\\,", "\n", "\\quad ", "\u200b \u00a0"])
def test_runs_of_spaces_are_collapsed_before_patterns_are_matched(space: str) -> None:
    assert normalize_latex("1" + space * (900 // len(space)) + "x") == "1 x"


def test_an_answer_that_grows_past_the_limit_when_normalized_is_not_read() -> None:
    assert canonical("½" * 900) is None
    assert canonical("½" * 9) is not None


class Counted:
    """Wrapper of a pattern that counts the characters searched and the matches found."""

    def __init__(self, pattern: Any) -> None:
        self.pattern, self.groups, self.begun, self.matches = pattern, pattern.groups, 0, 0

    def finditer(self, text: str, pos: int) -> Iterator[Any]:
        self.begun = len(text) - pos
        for match in self.pattern.finditer(text, pos):
            self.matches += 1
            yield match


def counted(spec: str, text: str, seconds: float = 60) -> tuple[Counted, str | None]:
    kind = parse_kind(spec)
    pattern = kind.__dict__["pattern"] = Counted(kind.pattern)
    answer = read_answer(text, kind, seconds=seconds)
    return pattern, None if answer is None else answer.written


def test_a_regex_is_matched_only_at_the_end_of_a_text_and_a_limited_number_of_times() -> None:
    for size in (1_000, 100_000, 1_000_000):
        pattern, written = counted(r"regex:x.*y|x", "y" * size + "xxx")
        assert (pattern.begun, pattern.matches, written) == (min(size + 3, extraction.LONGEST_MATCHED), 3, "x")
    pattern, written = counted(r"regex:\d", "7" * 1_000_000)
    assert (pattern.matches, written) == (extraction.MOST_MATCHES + 1, None)
    pattern, written = counted(r"regex:^\d", "7" + "x" * 1_000_000)
    assert written is None  # the searched part does not begin where the text begins


def test_a_regex_that_takes_too_much_processor_time_gives_no_answer() -> None:
    pattern, written = counted(r"regex:x.*y|x", "x" * 30_000, seconds=-1)
    assert (pattern.matches, written) == (1, None)


@pytest.mark.parametrize("kind", ["auto", "boxed", "choice", "number"])
def test_an_answer_is_searched_only_at_the_end_of_a_text(kind: str) -> None:
    answer = "\\boxed{B} The answer is B." if kind == "choice" else "\\boxed{7} The answer is 7."
    assert read_answer("x" * 10 * extraction.LONGEST_READ + answer, parse_kind(kind)) is not None
    assert read_answer(answer + "\n" + "." * extraction.LONGEST_READ, parse_kind(kind)) is None


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("[" + "9" * 100_000 + "]", "[" + "9" * 100_000 + "]"),  # all digits count
        ("[1000000000000000000000000000001.50]", "[1000000000000000000000000000001.5]"),
        ("[1e999999999]", "[1E+999999999]"),
        ("[1e99999999999999999999]", None),
        ("[1e-99999999999999999999]", None),
        ("[-0.0, 100]", "[0,1E+2]"),
        ("[" * 60 + "7" + "]" * 60, "[" * 60 + "7" + "]" * 60),
    ],
)
def test_json_numbers_of_any_size_keep_all_digits_or_are_not_read(text: str, spelled: str | None) -> None:
    assert canonical_answer(text, parse_kind("json")) == spelled


def test_failed_attempts_to_parse_json_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Decoder:
        def raw_decode(self, text: str, begin: int) -> tuple[Any, int]:
            tried.append(len(text) - begin)
            return plain.raw_decode(text, begin)

    plain = extraction._DECODER
    monkeypatch.setattr(extraction, "_DECODER", Decoder())
    for size in (100_000, 400_000, 1_600_000):
        tried.clear()
        assert read_answer("[ " * 60 + "1.5," * (size // 4), parse_kind("json")) is None
        assert sum(tried) <= 2 * (max(size, extraction.MOST_SCANNED) + size)  # from both ends


@pytest.mark.parametrize("piece", ["[", "[\n", "[1, ", "[0, 1) ", '["a', '{"a": ', "[[1], ", '["[1]", ', "{} [x]"])
def test_attempts_to_parse_json_in_any_text_are_bounded(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []
    parse = extraction._parse_json

    def counted(text: str, begin: int) -> Any:
        attempt = parse(text, begin)
        attempts.append(attempt.cost)
        return attempt

    monkeypatch.setattr(extraction, "_parse_json", counted)
    text = piece * (300_000 // len(piece))
    read_answer(text, parse_kind("json"))
    successes = len(text) + extraction.ATTEMPT * len(text)  # of values that are skipped then
    assert sum(attempts) <= 2 * (extraction.MOST_SCANNED + len(text)) + successes
