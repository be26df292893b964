"""AFS: the closed-form area against numerical integration, budgets outside the curve, and non-monotone curves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from discovery.data.recordings import Cell, RecordedBranch, RecordedQuestion, Split, intern_answers
from discovery.evaluation.afs import (
    CHAINS,
    Anchor,
    Curve,
    CurvePoint,
    accuracy_at,
    area_under,
    chain_anchor,
    curves,
    mean_afs,
)
from discovery.evaluation.replay_jobs import OUTCOME_COLUMNS
from discovery.evaluation.scores import Score
from tests.discovery.evaluation.test_evaluate import CELL, SOURCE, scores

Line = list[tuple[float, float]]

CHAIN = Anchor(1000.0, 40.0, 1500.0)
POINTS = st.tuples(st.integers(1, 200_000), st.integers(0, 100))
LINES = st.lists(POINTS, min_size=1, max_size=9)


def integrated(line: Line, anchor: Anchor, steps: int = 4000) -> float:
    """Return the mean accuracy over log budgets, by the midpoint rule in each stretch without a jump."""
    low, high = anchor.tokens, CHAINS * anchor.tokens
    cuts = sorted({low, high, *(min(max(tokens, low), high) for tokens, _ in line)})
    total = 0.0
    for left, right in pairwise(np.log(cuts)):
        width = (right - left) / steps
        budgets = np.exp(left + width * (np.arange(steps) + 0.5))
        total += width * sum(accuracy_at(line, anchor, float(budget)) for budget in budgets)
    return float(total / np.log(CHAINS))


@settings(max_examples=25, deadline=None)
@given(line=LINES, tokens=st.integers(200, 5000), accuracy=st.integers(0, 100))
def test_the_closed_form_area_equals_numerical_integration(line: Line, tokens: int, accuracy: int) -> None:
    anchor = Anchor(tokens, accuracy, 2 * tokens)
    assert area_under(line, anchor) == pytest.approx(integrated(line, anchor, 400), abs=0.02)


@settings(max_examples=200, deadline=None)
@given(line=LINES, up=st.integers(1, 20))
def test_the_area_lies_between_the_accuracies_and_rises_with_them(line: Line, up: int) -> None:
    seen = [CHAIN.accuracy, *(accuracy for _, accuracy in line)]
    area = area_under(line, CHAIN)
    assert min(seen) - 1e-9 <= area <= max(seen) + 1e-9
    higher = [(tokens, accuracy + up) for tokens, accuracy in line]
    assert area - 1e-9 <= area_under(higher, CHAIN) <= area + up + 1e-9


@settings(max_examples=100, deadline=None)
@given(line=LINES, factor=st.floats(0.01, 100))
def test_scaling_all_tokens_does_not_change_the_area(line: Line, factor: float) -> None:
    scaled = [(tokens * factor, accuracy) for tokens, accuracy in line]
    anchor = CHAIN._replace(tokens=CHAIN.tokens * factor)
    assert area_under(scaled, anchor) == pytest.approx(area_under(line, CHAIN), abs=1e-6)


def test_each_doubling_of_the_budget_has_equal_weight() -> None:
    """A jump by 60 points after k of the six doublings leaves 6 - k of them: ten points each."""
    for doublings in range(7):
        jump = CHAIN.tokens * 2**doublings
        assert area_under([(1000, 40), (jump, 40), (jump, 100)], CHAIN) == pytest.approx(
            40 + 10 * (6 - doublings), abs=1e-9
        )


def test_accuracy_stays_constant_beyond_the_last_point() -> None:
    line: Line = [(1000, 50), (2000, 70)]
    assert [accuracy_at(line, CHAIN, budget) for budget in (2000, 5000, 1e6, 1e9)] == [70] * 4
    assert area_under(line, CHAIN) == pytest.approx(area_under([*line, (64_000, 70)], CHAIN))


def test_below_the_first_point_accuracy_is_that_of_one_chain() -> None:
    line: Line = [(4000, 80), (8000, 90)]
    assert [accuracy_at(line, CHAIN, budget) for budget in (1, 1000, 3999)] == [40] * 3
    assert accuracy_at(line, CHAIN, 4000) == 80
    assert area_under(line, CHAIN) == pytest.approx(integrated(line, CHAIN), abs=0.01)
    assert area_under([(64_000, 100)], CHAIN) == pytest.approx(
        40
    )  # a point that costs as much as all chains adds nothing


def test_a_first_point_cheaper_than_one_chain_replaces_it() -> None:
    assert area_under([(500, 30)], CHAIN) == 30
    assert accuracy_at([(500, 30), (1500, 50)], CHAIN, 1000) == 40


def test_accuracy_is_interpolated_linearly_between_points() -> None:
    line: Line = [(1000, 40), (3000, 60), (5000, 50)]
    assert [accuracy_at(line, CHAIN, budget) for budget in (1000, 2000, 3000, 4500)] == [40, 50, 60, 52.5]


@pytest.mark.parametrize("tokens", [1500, 2000], ids=["fewer", "as many"])
def test_a_later_point_of_no_higher_cost_replaces_the_one_before(tokens: int) -> None:
    line: Line = [(1000, 40), (2000, 60), (tokens, 90), (4000, 100)]
    assert accuracy_at(line, CHAIN, 2000) == 90
    assert accuracy_at(line, CHAIN, 1999) == pytest.approx(60, abs=0.1)
    assert area_under(line, CHAIN) == pytest.approx(integrated([(1000, 40), (2000, 60)], CHAIN) + _gain(), abs=0.01)


def _gain() -> float:
    """Return the area above a line that stays at 60: 90 to 100 between 2,000 and 4,000 tokens, 100 thereafter."""
    rising = 25 * np.log(2) + (10 / 2000) * (4000 - 2000 - 2000 * np.log(2)) + 5 * np.log(2)
    return float((rising + 40 * np.log(16)) / np.log(CHAINS))


def test_jumps_of_zero_width_lose_no_precision() -> None:
    """The jump at β = 0 and points of equal cost have no width, so nothing is lost in them to rounding."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = float(rng.uniform(1001, 60_000))
        share = np.log(CHAINS * 1000 / tokens) / np.log(CHAINS)
        for line in ([(tokens, 100.0)], [(tokens, 0.0), (tokens, 100.0)], [(tokens, 7.0)] * 3 + [(tokens, 100.0)]):
            assert area_under(line, CHAIN) == pytest.approx(40 + 60 * share, abs=1e-9)


# Curves of scores


def score(beta: float, tokens: int, right: NDArray[np.int64], cell: Cell = CELL, path: int = 100) -> Score:
    """Return the score of two shuffles of two questions."""
    outcomes = np.zeros((len(OUTCOME_COLUMNS), 2, 2), np.int64)
    outcomes[OUTCOME_COLUMNS.index("right")] = right
    outcomes[OUTCOME_COLUMNS.index("tokens")] = tokens
    outcomes[OUTCOME_COLUMNS.index("critical_path")] = path
    return Score("mine", "0" * 64, beta, cell, outcomes, [], 1.0)


NONE, HALF, ALL = (np.array(row) for row in ([[0, 0], [0, 0]], [[1, 0], [1, 0]], [[1, 1], [1, 1]]))
OTHER = Cell("m", "c", Split.SEARCH)


def test_scores_become_one_curve_per_cell_ordered_by_beta() -> None:
    measured = [score(1, 64_000, ALL), score(0, 1000, NONE), score(0.5, 2000, HALF, OTHER, 3000)]
    mine, other = curves(measured, {CELL: CHAIN, OTHER: CHAIN})
    assert (mine.cell, other.cell) == (CELL, OTHER)
    assert mine.points == [CurvePoint(0, 1000, 0, 100), CurvePoint(1, 64_000, 100, 100)]
    assert other.points == [CurvePoint(0.5, 2000, 50, 3000)]
    assert mean_afs([mine, other]) == (mine.afs + other.afs) / 2
    assert mine.accuracy_at(32_500) == 50
    assert (mine.slowdown, other.slowdown) == (0, 1)  # a critical path of 3,000 tokens, where a chain has 1,500


def test_curve_points_equal_the_means_of_their_scores() -> None:
    measured = scores("self_consistency@4", "single", betas=[0.0, 1.0])
    anchors = {cell: chain_anchor([intern_answers(one) for one in SOURCE.load(cell)]) for cell in SOURCE.cells()}
    for name in ("self_consistency@4", "single"):
        mine = [one for one in measured if one.controller == name]
        for curve in curves(mine, anchors):
            ours = [one for one in mine if one.cell == curve.cell]
            assert [(one.tokens, one.accuracy) for one in curve.points] == [
                (one.mean("tokens"), one.accuracy) for one in ours
            ]
            assert curve.slowdown >= 0


def test_the_anchor_of_one_chain_is_the_mean_over_questions() -> None:
    def asked(name: str, *chains: tuple[int, str], reference: str = "7") -> RecordedQuestion:
        branches = [RecordedBranch([], tokens, final) for tokens, final in chains]
        return RecordedQuestion(name, "m", "b", 100, branches, reference)

    two = [asked("a", (100, "7"), (300, "8")), asked("b", (500, "7"))]
    assert chain_anchor([intern_answers(one) for one in two]) == pytest.approx(Anchor(350, 75, 480))
    unseen = asked("c", (100, "7"), reference="9")
    assert chain_anchor([intern_answers(unseen)]).accuracy == 0


@pytest.mark.parametrize(
    ("tokens", "rises"),
    [
        ((100, 200, 300), True),
        ((100, 100, 100), True),
        ((100, 98, 97), True),  # a decrease within chance
        ((100, 97, 300), False),
        ((100, 300, 200), False),
        ((100,), True),
    ],
)
def test_a_curve_rises_if_no_larger_beta_spends_less(tokens: tuple[int, ...], rises: bool) -> None:
    curve = Curve(CELL, CHAIN, [CurvePoint(at / 4, spent, 50, 1) for at, spent in enumerate(tokens)])
    assert curve.rises is rises
