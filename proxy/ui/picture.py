"""Picture of a recorded episode: its branches by depth, and the votes by round on the same axis.

The axis is the sequential tokens: a round is as wide as the branch that ran longest in it. All sizes are in the units
of the drawing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

from controllers import Advanced, Verb
from discovery.audit.explain import LabelName
from discovery.audit.served_episodes import replay_states
from discovery.store import ServedEpisode

COLOURS: Final = 8
"""Colours that answers have; further answers share them."""
MOST_BRANCHES: Final = 128
WIDTH: Final = 960
_LEFT, _RIGHT, _TOP, _ROW, _GAP, _VOTES = 44, 16, 20, 16, 14, 110
_TICKS: Final = 6


class PictureSegment(NamedTuple):
    """Tokens that a branch generated in one action."""

    x: float
    y: float
    width: float
    colour: str  # class of the answer known at that time; empty if none was
    title: str


class PictureMark(NamedTuple):
    """A probe, an end or a prune."""

    x: float
    y: float
    sign: str  # empty for a probe, which is drawn as a dot
    title: str


class VoteLine(NamedTuple):
    """Votes for one answer after each round."""

    answer: str
    colour: str
    path: str  # `d` of an SVG path
    votes: int  # at the end


class PictureTick(NamedTuple):
    """A labelled position of an axis."""

    at: float
    text: str


class EpisodePicture(NamedTuple):
    """Everything that the template draws."""

    height: float
    segments: Sequence[PictureSegment]
    marks: Sequence[PictureMark]
    names: Sequence[PictureTick]  # of the rows
    ticks: Sequence[PictureTick]  # tokens
    rounds: Sequence[float]  # ends of rounds
    lines: Sequence[VoteLine]
    axis_y: float  # of the tokens
    votes_top: float
    votes_bottom: float
    most_votes: int
    hidden: int  # branches beyond MOST_BRANCHES

    @property
    def left(self) -> float:
        """Position of zero tokens."""
        return _LEFT

    @property
    def right(self) -> float:
        """Position of the last token."""
        return WIDTH - _RIGHT


class _Raw(NamedTuple):
    """A segment before it is scaled."""

    branch: int
    start: int
    tokens: int
    label: int | None


def draw(episode: ServedEpisode, name: LabelName) -> EpisodePicture:
    """Return the picture of an episode. `name` gives the text of an answer. Raises TraceError."""
    segments: list[_Raw] = []
    marks: list[tuple[int, int, str, str]] = []  # branch, position in tokens, sign, title
    ends: list[int] = [0]
    votes: list[dict[int, int]] = [{}]
    known: dict[int, int] = {}  # latest answer of each branch
    reached: dict[int, int] = {}  # position at which each branch stands
    width = 0
    for state, played in replay_states(episode):
        width = state.width
        if played is None:
            continue
        start, grown = ends[-1], defaultdict[int, int](int)
        for action in played.actions:
            if action.verb is Verb.PRUNE:
                marks.append((action.branch, reached.get(action.branch, start), "✕", "pruned"))
        for fact in played.facts:
            index = fact.branch
            if fact.label is not None:
                known[index] = fact.label
            if isinstance(fact, Advanced):
                segments.append(_Raw(index, start + grown[index], fact.tokens, known.get(index)))
                grown[index] += fact.tokens
                reached[index] = start + grown[index]
                if fact.finished:
                    answer = "without an answer" if fact.label is None else f"with {name(fact.label)}"
                    marks.append((index, reached[index], "✓", f"finished {answer}"))
            elif not state.branches[index].finished:
                marks.append((index, reached.get(index, start), "", f"probed: {_answer(fact.label, name)}"))
                _repaint(segments, index, fact.label)
        ends.append(start + max(grown.values(), default=0))
        votes.append(dict(state.votes))
    return _scaled(segments, marks, ends, votes, width, name)


def _repaint(segments: list[_Raw], branch: int, label: int | None) -> None:
    """Give the latest segment of a branch the answer that a probe revealed."""
    for at in range(len(segments) - 1, -1, -1):
        if segments[at].branch == branch:
            segments[at] = segments[at]._replace(label=label)
            return


def _scaled(
    segments: Sequence[_Raw],
    marks: Sequence[tuple[int, int, str, str]],
    ends: Sequence[int],
    votes: Sequence[dict[int, int]],
    width: int,
    name: LabelName,
) -> EpisodePicture:
    shown = min(width, MOST_BRANCHES)
    longest = max(1, ends[-1])
    scale = (WIDTH - _LEFT - _RIGHT) / longest

    def x(tokens: float) -> float:
        return round(_LEFT + tokens * scale, 1)

    votes_top, votes_bottom = _TOP, _TOP + _VOTES

    def y(branch: int) -> float:
        return votes_bottom + _GAP + branch * _ROW

    axis_y = y(shown) + 2
    most = max((count for each in votes for count in each.values()), default=0)
    labels = sorted(votes[-1], key=lambda label: -votes[-1][label])

    def line(label: int) -> str:
        heights = [votes_bottom - each.get(label, 0) / max(1, most) * _VOTES for each in votes]
        parts = [f"M{x(ends[0])} {heights[0]:.1f}"]
        parts += [f"H{x(end)} V{height:.1f}" for end, height in zip(ends[1:], heights[1:], strict=True)]
        return " ".join(parts)

    step = _nice_step(longest / _TICKS)
    return EpisodePicture(
        height=axis_y + 34,
        segments=[
            PictureSegment(
                x(raw.start),
                y(raw.branch) + 2,
                round(max(1.0, raw.tokens * scale), 1),
                colour_of(raw.label),
                f"branch {raw.branch + 1}: {raw.tokens:,} tokens, {_answer(raw.label, name)}",
            )
            for raw in segments
            if raw.branch < shown
        ],
        marks=[
            PictureMark(x(at), y(branch) + _ROW / 2, sign, f"branch {branch + 1} {title}")
            for branch, at, sign, title in marks
            if branch < shown
        ],
        names=[PictureTick(y(branch) + 12, str(branch + 1)) for branch in range(shown)],
        ticks=[PictureTick(x(tokens), f"{tokens:,}") for tokens in range(0, longest + 1, step)],
        rounds=[x(end) for end in ends[1:]],
        lines=[VoteLine(name(label), colour_of(label), line(label), votes[-1][label]) for label in labels],
        axis_y=axis_y,
        votes_top=votes_top,
        votes_bottom=votes_bottom,
        most_votes=most,
        hidden=width - shown,
    )


def colour_of(label: int | None) -> str:
    """Return the class of an answer's colour; empty without an answer."""
    return "" if label is None else str(label % COLOURS)


def _answer(label: int | None, name: LabelName) -> str:
    return "no answer" if label is None else f"answer {name(label)}"


def _nice_step(least: float) -> int:
    """Return 1, 2 or 5 times a power of ten that is at least `least`."""
    power = 10 ** math.floor(math.log10(max(1.0, least)))
    return next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= least)
