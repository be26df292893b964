"""Tuning: only numbers of the constructor change, and generations depend only on the record."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.advice import advise
from discovery.search.cascade import BASELINE
from discovery.search.explorers import Candidate, ExplorerContext, ScoredCandidate
from discovery.search.explorers.evolution import Vector, next_generation
from discovery.search.explorers.files import Files
from discovery.search.explorers.grammar import Grammar
from discovery.search.explorers.tuned import Tuned, spots_of, varied

SOURCE = '''"""β goes in, 7 comes out."""

from controllers import advance, answer, branch


class Mine:
    def __init__(self, beta: float) -> None:
        self.first = round(2 + 30 * beta**1.5)  # not these: 5, 6
        self.sure = 0.25 + 0.7 * beta
        self.none, self.one, self.yes, self.word = 0, 1, True, "3"

    def decide(self, state):
        if not state.width:
            return [branch()] * min(64, self.first)
        return [advance(i) for i in state.active] or [answer(state.leader())]
'''
VALUES = [2, 30, 1.5, 0.25, 0.7]


def standing(candidate: Candidate, score: float | None) -> ScoredCandidate:
    return ScoredCandidate(candidate, score)


def test_the_tunable_numbers_of_the_constructor_are_found() -> None:
    assert sorted(spot.value for spot in spots_of(SOURCE)) == sorted(VALUES)
    assert spots_of("def f(:") == []
    huge = SOURCE.replace("30", f"0x{'f' * 400}", 1).replace("1.5", "1e308", 1)
    assert len(spots_of(huge)) == len(VALUES) - 2  # numbers too large to scale are left out


@given(factors=st.lists(st.floats(-9, 9), min_size=5, max_size=5))
def test_varying_a_file_changes_only_its_numbers(factors: list[float]) -> None:
    spots = spots_of(SOURCE)
    made = varied(SOURCE, spots, np.array(factors))
    assert advise(made) == []
    again = spots_of(made)
    kept = [spot.is_integer for spot in again if spot.value not in (0, 1)]
    assert len(kept) <= len(spots)  # 0 and 1 are not tuned
    for old, new in zip(ast.walk(ast.parse(SOURCE)), ast.walk(ast.parse(made)), strict=True):
        assert type(old) is type(new)
        if isinstance(old, ast.Constant) and isinstance(new, ast.Constant):
            assert type(old.value) is type(new.value)
    assert varied(SOURCE, spots, np.zeros(5)) == SOURCE


def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def test_proposals_of_the_explorer_are_tuned_between_and_after_its_batches(tmp_path: Path) -> None:
    tuned = Tuned(Files(folder(tmp_path)), batch=4)
    baseline = standing(Candidate("cmc", "x", BASELINE), 59.0)
    (first,) = tuned.propose(ExplorerContext(3, 1, [baseline]))
    assert first.source == SOURCE
    standings = [baseline, standing(first, 50.0)]
    for step in range(2, 6):
        made = tuned.propose(ExplorerContext(3, step, standings))
        assert made == Tuned(Files(tmp_path), batch=4).propose(
            ExplorerContext(3, step, standings)
        )  # no state between steps
        assert len(made) == 4
        assert {one.explorer for one in made} == {"files"}
        assert all(one.parent in {other.candidate.digest for other in standings} for one in made)
        assert len({one.digest for one in made}) == 4
        standings += [standing(one, 50.0 + step + at) for at, one in enumerate(made)]
    roots = {one.candidate.genome.get("root") for one in standings[2:]}
    assert roots == {first.digest}


def test_a_file_without_tunable_numbers_is_not_varied(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, beta): ...\n    def decide(self, state): ...\n"
    )
    tuned = Tuned(Files(tmp_path))
    (first,) = tuned.propose(ExplorerContext(0, 1, []))
    assert tuned.propose(ExplorerContext(0, 2, [standing(first, 50.0)])) == []


@pytest.mark.parametrize("seed", range(3))
def test_generations_approach_the_optimum(seed: int) -> None:
    """The optimum is out of reach of the first generation."""
    top = np.array([0.6, -0.4, 0.3])
    scored: list[tuple[Vector, float]] = []
    for step in range(30):
        for child in next_generation([0.0] * 3, scored, 100 * seed + step, 6, 0.15):
            scored.append((child, -float(((child - top) ** 2).sum())))
    assert max(score for _, score in scored[:6]) < -0.1
    assert max(score for _, score in scored) > -0.01


def test_the_grammar_goes_on_beside_its_tuned_files() -> None:
    standings: list[ScoredCandidate] = []
    for step in range(1, 8):
        made = Tuned(Grammar(batch=2), batch=2).propose(ExplorerContext(3, step, standings))
        assert {one.is_tuned for one in made} == {step % 2 == 0}
        standings += [standing(one, 50.0 + step + at) for at, one in enumerate(made)]


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_numbers_are_tuned_only_if_no_line_ends_with_a_lone_carriage_return(end: str) -> None:
    source = SOURCE.replace("\n", end)
    spots = spots_of(source)
    assert len(spots) == (0 if end == "\r" else len(VALUES))
    assert varied(source, spots, np.zeros(len(spots))) == source
