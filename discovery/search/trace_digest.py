"""What went badly in a controller's episodes, in words and small tables, for whoever writes the next one.

Traces say what was done; the recordings, replayed beside them, say which label was right. That is all that is told of
them: labels are letters, and the right one is marked. No question, no answer's text, no name of a model or benchmark.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from controllers import Round, State, Verb, run_sync
from discovery.data.recordings import Cell, Recording, Split
from discovery.data.traces import Trace, TracedEpisode, read_trace
from discovery.errors import RecordingsNotFound
from discovery.evaluation.replay import ReplayEnvironment, branch_order

T = TypeVar("T")
LONGEST: Final = 6_000
"""Characters a digest may have."""
LOOKED_AT: Final = 1_500
"""Episodes that are replayed, drawn evenly from the files."""
ROWS: Final = 6
"""Rounds of an episode that are shown."""


class EpisodeFault(StrEnum):
    """What an episode is told for, the first that fits."""

    PRUNED = "pruned though right"  # wrong, and a branch was given up that said what is right
    LOST = "had it and lost it"  # wrong, though some branch showed what is right
    STOPPED = "stopped though wrong"  # wrong, and no branch it opened had shown what is right
    WASTED = "went on though settled"  # right, and told for what it spent after that was clear


@dataclass(frozen=True)
class StudiedEpisode:
    """An episode in figures."""

    path: Path  # its trace
    at: int  # position there
    cell: Cell
    question: int  # position in its cell
    beta: float
    right: bool
    correct: int | None  # the label that is right, if it ever appeared
    rounds: int
    width: int  # branches opened
    spent: int  # tokens
    settled: int  # tokens spent when the answer came to lead for good
    settled_in: int  # in that round, from 1
    showed: int  # branches that at some time showed the right label
    pruned: int  # branches given up while they did
    running: int  # branches that ran when it stopped
    chains: int  # recorded
    chains_right: int  # of those, that end right

    @property
    def fault(self) -> EpisodeFault:
        """What it is told for."""
        if self.right:
            return EpisodeFault.WASTED
        return EpisodeFault.PRUNED if self.pruned else EpisodeFault.LOST if self.showed else EpisodeFault.STOPPED

    @property
    def after(self) -> int:
        """Tokens spent after the answer led for good."""
        return self.spent - self.settled

    @property
    def weight(self) -> float:
        """How much there is to learn from it, among those of its fault."""
        if self.fault is EpisodeFault.WASTED:
            return self.after
        if self.fault is EpisodeFault.STOPPED:
            return self.chains_right / self.chains
        return (self.pruned if self.fault is EpisodeFault.PRUNED else self.showed) / self.width


def digest(traces: Sequence[Path], recordings: Mapping[Cell, Sequence[Recording]], most: int = 6) -> str:
    """The worst and most wasteful of a controller's episodes, `most` of them at most, in at most LONGEST characters.

    `traces` are one controller's files, as `Rules(traces=…)` has them written; `recordings` the cells they are of.
    Episodes that ended by their controller's fault are left out.

    Raises TraceError, and RecordingsNotFound if a question of the traces is not among the recordings.
    """
    studied = [one for path in sorted(traces) for one in _study(path, recordings, -(-LOOKED_AT // len(traces)))]
    if not studied:
        return "No episode came to an answer."
    cells = {cell: number for number, cell in enumerate(dict.fromkeys(one.cell for one in studied), 1)}
    text = _overview(studied, len(cells))
    for number, one in enumerate(_worst(studied, most), 1):
        told = "\n\n" + _tell(one, f"Episode {number} (cell {cells[one.cell]}, β = {one.beta:g})")
        if len(text) + len(told) > LONGEST:
            break
        text += told
    return text


# Which episodes


def _study(path: Path, recordings: Mapping[Cell, Sequence[Recording]], most: int) -> Iterator[StudiedEpisode]:
    """Up to `most` episodes of a file that came to an answer."""
    trace = read_trace(path)
    played, episodes = _recordings(trace, recordings), trace.episodes()
    drawn = random.Random(0).sample(range(len(episodes)), min(most, len(episodes)))
    for at in sorted(drawn):
        episode = episodes[at]
        studied = _figures(path, trace, at, episode, played[episode.question])
        if studied is not None:
            yield studied


def _recordings(trace: Trace, recordings: Mapping[Cell, Sequence[Recording]]) -> list[Recording]:
    """Those of the trace's questions, in its order."""
    known = {recording.question: recording for recording in recordings.get(_cell(trace), ())}
    try:
        return [known[question] for question in trace.about["questions"]]
    except KeyError:
        raise RecordingsNotFound(
            f"{' '.join(_cell(trace))}: the trace is of questions that are not recorded there"
        ) from None


def _cell(trace: Trace) -> Cell:
    return Cell(trace.about["model"], trace.about["benchmark"], Split(trace.about["split"]))


def _figures(path: Path, trace: Trace, at: int, episode: TracedEpisode, recording: Recording) -> StudiedEpisode | None:
    """Play an episode's rounds again beside its recording; None if it came to no answer."""
    environment = ReplayEnvironment(recording, branch_order(recording, episode.shuffle))
    showed: set[int] = set()
    pruned: set[int] = set()
    settled, settled_in, leads, state = 0, 0, False, None
    for state, played in trace.states(at):
        run_sync(environment.execute(played.actions))
        correct = _correct(environment, recording)
        if correct is not None:
            showed.update(fact.branch for fact in played.facts if fact.label == correct)
            pruned.update(i for i in _dropped(played, state) if state.branches[i].label == correct)
        if state.leader() != episode.answer:
            leads = False
        elif not leads:
            settled, settled_in, leads = state.spent, state.rounds, True
    if state is None or state.stop is None:
        return None
    return StudiedEpisode(
        path=path,
        at=at,
        cell=_cell(trace),
        question=episode.question,
        beta=trace.about["beta"],
        right=episode.right,
        correct=_correct(environment, recording),
        rounds=state.rounds,
        width=state.width,
        spent=state.spent,
        settled=settled if leads else state.spent,
        settled_in=settled_in if leads else state.rounds,
        showed=len(showed),
        pruned=len(pruned),
        running=len(state.active),
        chains=recording.branches,
        chains_right=int((recording.finals == recording.reference).sum()) if recording.reference >= 0 else 0,
    )


def _correct(environment: ReplayEnvironment, recording: Recording) -> int | None:
    """The label of the reference answer, once it has appeared."""
    revealed = environment.revealed
    return revealed.index(recording.reference) if recording.reference in revealed else None


def _dropped(played: Round, state: State) -> Iterator[int]:
    """Branches the round gave up."""
    for action in played.actions:
        if action.verb is Verb.PRUNE and state.branches[action.branch].pruned:
            yield action.branch


def _worst(studied: Sequence[StudiedEpisode], most: int) -> list[StudiedEpisode]:
    """The worst of each fault by turns, no question twice."""
    ranked = [
        sorted((one for one in studied if one.fault is fault and one.weight), key=lambda one: -one.weight)
        for fault in EpisodeFault
    ]
    chosen: dict[tuple[Cell, int], StudiedEpisode] = {}
    for one in (one for turn in zip_longest(*ranked) for one in turn if one is not None):
        if len(chosen) < most:
            chosen.setdefault((one.cell, one.question), one)
    return list(chosen.values())


# What is said of them


class _Line(NamedTuple):
    """What is told of all episodes at one β."""

    beta: float
    episodes: int
    right: float  # percent
    tokens: float
    after: float  # percent of tokens spent after the answer led for good
    faults: list[float]  # percent of episodes, by fault but the last

    def __str__(self) -> str:
        faults = "".join(f"{share:9.1f}" for share in self.faults)
        return f"{self.beta:5.2f}{self.episodes:10d}{self.right:9.1f}{self.tokens:11,.0f}{self.after:9.1f}{faults}"


def _overview(studied: Sequence[StudiedEpisode], cells: int) -> str:
    betas = sorted({one.beta for one in studied})
    lines = [_line(beta, [one for one in studied if one.beta == beta]) for beta in betas]
    return "\n".join(
        [
            f"{len(studied)} episodes over {cells} cell{'s' * (cells > 1)}. Of each β: percent right, mean tokens,",
            "percent of them spent after the answer had come to lead for good, and percent of episodes that ended",
            "wrong: having pruned a branch that said what is right; having had it otherwise; never having had it.",
            "    β  episodes    right     tokens    after   pruned      had    never",
            *map(str, _thinned(lines, 2 * ROWS)),
        ]
    )


def _line(beta: float, mine: Sequence[StudiedEpisode]) -> _Line:
    spent = sum(one.spent for one in mine)
    counts = Counter(one.fault for one in mine)
    faults = [
        100 * counts[fault] / len(mine) for fault in (EpisodeFault.PRUNED, EpisodeFault.LOST, EpisodeFault.STOPPED)
    ]
    right = 100 * sum(one.right for one in mine) / len(mine)
    after = 100 * sum(one.after for one in mine) / max(1, spent)
    return _Line(beta, len(mine), right, spent / len(mine), after, faults)


def _tell(one: StudiedEpisode, title: str) -> str:
    """One episode: what it is told for, what was where, and some of its rounds."""
    trace = read_trace(one.path)
    answer = trace.episodes()[one.at].answer
    said = "nothing" if answer is None else f"{_letter(answer)}, {'right' if one.right else 'wrong'}"
    if one.correct is None:
        showed = f"What is right was never shown by any of {one.width} branches."
    else:
        showed = f"Right is {_letter(one.correct)}+: of {one.width} branches {one.showed} showed it"
        showed += f" and {one.pruned} were pruned while they did."
    rows, opened = _rounds(trace, one)
    return "\n".join(
        [
            f"{title}: {one.fault}.",
            f"It answered {said}. {one.rounds} rounds, {one.spent:,} tokens; {one.running} branches ran still.",
            f"That led for good from round {one.settled_in} on, {one.after:,} tokens before the end.",
            f"{showed} {one.chains_right} of {one.chains} recorded chains end right.",
            f"Opened: {opened}.",
            "round  running  finished     tokens  votes; what running ones say",
            *rows,
        ]
    )


def _rounds(trace: Trace, one: StudiedEpisode) -> tuple[list[str], str]:
    """Some rounds, a line each, and when branches were opened."""
    rows: list[str] = []
    opened: list[str] = []
    said = ""
    for state, played in trace.states(one.at):
        new = sum(action.verb is Verb.BRANCH for action in played.actions)
        if new:
            opened.append(f"{new} in round {state.rounds}")
        leaning = Counter(label for i in state.active if (label := state.branches[i].label) is not None)
        votes = f"{_votes(state.votes, one.correct)}; {_votes(leaning, one.correct)}"
        row = f"{state.rounds:5d}{len(state.active):9d}{len(state.finished):10d}{state.spent:11,d}  {votes}"
        if votes != said or state.stop is not None:
            rows.append(row)
        said = votes
    more = f", … {len(opened) - ROWS} more times" if len(opened) > ROWS else ""
    return _thinned(rows, ROWS), ", ".join(opened[:ROWS]) + more


def _votes(votes: Mapping[int, int], correct: int | None, most: int = 4) -> str:
    """`A 5, C+ 2 …`: labels by falling count, the right one marked."""
    ranked = sorted(votes.items(), key=lambda one: -one[1])
    words = [f"{_letter(label)}{'+' * (label == correct)} {count}" for label, count in ranked[:most]]
    return (", ".join(words) or "–") + (" …" if len(ranked) > most else "")


def _letter(label: int) -> str:
    """A, B, …, Z, A1, …: labels in the order they appeared."""
    turn, letter = divmod(label, 26)
    return chr(ord("A") + letter) + (str(turn) if turn else "")


def _thinned(lines: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(at * (len(lines) - 1) / (most - 1))] for at in range(most)]
