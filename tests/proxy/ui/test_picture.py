"""The picture of an episode: segments, marks and votes on one axis of sequential tokens."""

from __future__ import annotations

import pytest

from controllers import Advanced, Probed, Round, advance, answer, branch, probe, prune
from discovery.data.packed_rounds import pack_rounds
from discovery.errors import TraceError
from discovery.store import EpisodeDetails, ServedEpisode
from proxy.ui.picture import MOST_BRANCHES, WIDTH, colour_of, draw

ROUNDS = [
    Round([branch(), branch()], [Advanced(0, 1, 10, False), Advanced(1, 1, 10, False)]),
    Round([probe(0), probe(1)], [Probed(0, 0, 3), Probed(1, 1, 3)]),
    Round([prune(1), advance(0, 3)], [Advanced(0, 3, 25, True, 0)]),
    Round([answer(0)], []),
]


def served(rounds: list[Round] = ROUNDS, branches: int = 2) -> ServedEpisode:
    about = EpisodeDetails(limits={"interval": 10, "max_branches": 200}, answers=["7", "9"])
    trace = pack_rounds(rounds)
    return ServedEpisode(
        "i", "r", "m", "c", "d", 0.5, len(rounds), branches, {}, "answered", "7", about=about, trace=trace
    )


def named(label: int) -> str:
    return ["seven", "nine"][label]


def test_segments_are_as_wide_as_their_tokens_and_follow_one_another() -> None:
    picture = draw(served(), named)
    first, second, third = picture.segments
    scale = (picture.right - picture.left) / 35  # the sequential tokens: 10 and 25
    assert (first.x, second.x) == (picture.left, picture.left)
    assert first.width == second.width == pytest.approx(10 * scale, abs=0.1)
    assert third.x == pytest.approx(picture.left + 10 * scale, abs=0.1)
    assert third.x + third.width == pytest.approx(picture.right, abs=0.2)
    assert first.y == third.y < second.y
    assert picture.right < WIDTH


def test_a_probe_colours_the_part_that_it_looked_at() -> None:
    first, second, third = draw(served(), named).segments
    assert (first.colour, second.colour, third.colour) == ("0", "1", "0")
    assert "answer nine" in second.title


def test_probes_ends_and_prunes_are_marked_where_they_happened() -> None:
    picture = draw(served(), named)
    assert [mark.sign for mark in picture.marks] == ["", "", "✕", "✓"]
    end = picture.marks[-1]
    assert end.x == pytest.approx(picture.right, abs=0.2)
    assert end.title == "branch 1 finished with seven"
    assert picture.marks[1].title == "branch 2 probed: answer nine"


def test_votes_rise_at_the_end_of_the_round_in_which_a_branch_finished() -> None:
    picture = draw(served(), named)
    (line,) = picture.lines
    assert (line.answer, line.votes, line.colour) == ("seven", 1, "0")
    assert line.path.startswith(f"M{picture.left:.1f} {picture.votes_bottom:.1f}")
    assert line.path.endswith(f"V{picture.votes_top:.1f}")
    assert len(picture.rounds) == len(ROUNDS)


def test_many_branches_are_drawn_up_to_a_number_and_the_others_counted() -> None:
    width = MOST_BRANCHES + 7
    opened = Round([branch()] * width, [Advanced(index, 1, 5, True, None) for index in range(width)])
    picture = draw(served([opened], width), named)
    assert len(picture.names) == MOST_BRANCHES
    assert picture.hidden == 7
    assert not picture.lines


def test_an_episode_without_rounds_has_an_empty_picture() -> None:
    picture = draw(served([], 0), named)
    assert not picture.segments
    assert picture.most_votes == 0


def test_an_impossible_record_is_reported() -> None:
    with pytest.raises(TraceError, match="impossible"):
        draw(served([Round([advance(3)], [Advanced(3, 1, 10, False)])]), named)


def test_more_answers_than_colours_share_colours() -> None:
    assert [colour_of(label) for label in (None, 0, 7, 8)] == ["", "0", "7", "0"]
