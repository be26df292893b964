"""Digest of a controller's traces: its worst episodes as short texts and tables, for explorers to learn from.

The actions come from the traces. The recordings, replayed along with them, give the correct label. A digest
shows labels as letters and marks the correct one. It contains no question, no answer text, and no name of a model or
benchmark.
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
from discovery.data.traces import Trace, TracedEpisode, finished_confidences, read_trace, running_confidences
from discovery.errors import RecordingsNotFound
from discovery.evaluation.replay import ReplayEnvironment, branch_order

T = TypeVar("T")
LONGEST: Final = 6_000
"""Maximum characters of a digest."""
LOOKED_AT: Final = 1_500
"""Maximum episodes that are replayed, sampled evenly from the files."""
ROWS: Final = 6
"""Maximum rounds shown of an episode."""
HEADINGS: Final = "round  running  finished     tokens  votes; latest labels of running branches"
CONFIDENCES: Final = " (in brackets their mean confidence in per mille)"
"""Added to the headings if signals are known."""


class EpisodeFault(StrEnum):
    """Why an episode is shown; the first value that fits."""

    PRUNED = "pruned a correct branch"  # wrong, and a branch with the correct label was pruned
    LOST = "saw the correct answer and lost it"  # wrong, although some branch showed the correct label
    STOPPED = "stopped before seeing the correct answer"  # wrong, and no opened branch had shown the correct label
    WASTED = (
        "continued after the answer was settled"  # correct; shown for the tokens spent after the answer was settled
    )


@dataclass(frozen=True)
class StudiedEpisode:
    """Figures of one episode."""

    path: Path  # trace file
    at: int  # position in the trace file
    cell: Cell
    question: int  # position in the cell
    beta: float
    right: bool
    correct: int | None  # the correct label, if it ever appeared
    rounds: int
    width: int  # branches opened
    spent: int  # tokens
    settled: int  # tokens spent when the answer took the lead for good
    settled_in: int  # round in which it did, from 1
    showed: int  # branches that showed the correct label at some time
    pruned: int  # branches pruned while they showed it
    running: int  # branches still running at the end
    chains: int  # recorded chains
    chains_right: int  # recorded chains that end correct

    @property
    def fault(self) -> EpisodeFault:
        """Why the episode is shown."""
        if self.right:
            return EpisodeFault.WASTED
        return EpisodeFault.PRUNED if self.pruned else EpisodeFault.LOST if self.showed else EpisodeFault.STOPPED

    @property
    def after(self) -> int:
        """Tokens spent after the answer took the lead for good."""
        return self.spent - self.settled

    @property
    def weight(self) -> float:
        """Rank of the episode among those with the same fault; higher is more instructive."""
        if self.fault is EpisodeFault.WASTED:
            return self.after
        if self.fault is EpisodeFault.STOPPED:
            return self.chains_right / self.chains
        return (self.pruned if self.fault is EpisodeFault.PRUNED else self.showed) / self.width


def digest_traces(traces: Sequence[Path], recordings: Mapping[Cell, Sequence[Recording]], most: int = 6) -> str:
    """Describe up to `most` of a controller's worst and most wasteful episodes in at most LONGEST characters.

    `traces` are one controller's files, as written with `ReplayRules(traces=…)`. `recordings` are their cells.
    Episodes in which the controller itself failed are left out.

    Raises TraceError, and RecordingsNotFound if a question of the traces is not among the recordings.
    """
    studied = [episode for path in sorted(traces) for episode in _study(path, recordings, -(-LOOKED_AT // len(traces)))]
    if not studied:
        return "No episode ended with an answer."
    cells = {cell: number for number, cell in enumerate(dict.fromkeys(episode.cell for episode in studied), 1)}
    text = _overview(studied, len(cells))
    for number, episode in enumerate(_worst(studied, most), 1):
        section = "\n\n" + _describe(episode, f"Episode {number} (cell {cells[episode.cell]}, β = {episode.beta:g})")
        if len(text) + len(section) > LONGEST:
            break
        text += section
    return text


# Which episodes


def _study(path: Path, recordings: Mapping[Cell, Sequence[Recording]], most: int) -> Iterator[StudiedEpisode]:
    """Yield figures of up to `most` episodes of a file that ended with an answer."""
    trace = read_trace(path)
    played, episodes = _recordings(trace, recordings), trace.episodes()
    drawn = random.Random(0).sample(range(len(episodes)), min(most, len(episodes)))
    for at in sorted(drawn):
        episode = episodes[at]
        studied = _replay(path, trace, at, episode, played[episode.question])
        if studied is not None:
            yield studied


def _recordings(trace: Trace, recordings: Mapping[Cell, Sequence[Recording]]) -> list[Recording]:
    """Return the recordings of the trace's questions, in its order."""
    known = {recording.question: recording for recording in recordings.get(_cell(trace), ())}
    try:
        return [known[question] for question in trace.about["questions"]]
    except KeyError:
        raise RecordingsNotFound(
            f"{' '.join(_cell(trace))}: the trace contains questions that are not among the recordings"
        ) from None


def _cell(trace: Trace) -> Cell:
    return Cell(trace.about["model"], trace.about["benchmark"], Split(trace.about["split"]))


def _replay(path: Path, trace: Trace, at: int, episode: TracedEpisode, recording: Recording) -> StudiedEpisode | None:
    """Replay an episode's rounds along with its recording; return its figures, or None if it has no answer."""
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
        chains_right=int(recording.are_right(recording.finals).sum()),
    )


def _correct(environment: ReplayEnvironment, recording: Recording) -> int | None:
    """Return the label of the reference answer, once it has appeared."""
    revealed = environment.revealed
    return revealed.index(recording.reference) if recording.reference in revealed else None


def _dropped(played: Round, state: State) -> Iterator[int]:
    """Yield the branches that the round pruned."""
    for action in played.actions:
        if action.verb is Verb.PRUNE and state.branches[action.branch].pruned:
            yield action.branch


def _worst(studied: Sequence[StudiedEpisode], most: int) -> list[StudiedEpisode]:
    """Pick the worst episodes of each fault in turn, no question twice."""
    ranked = [
        sorted(
            (episode for episode in studied if episode.fault is fault and episode.weight),
            key=lambda episode: -episode.weight,
        )
        for fault in EpisodeFault
    ]
    chosen: dict[tuple[Cell, int], StudiedEpisode] = {}
    for episode in (episode for turn in zip_longest(*ranked) for episode in turn if episode is not None):
        if len(chosen) < most:
            chosen.setdefault((episode.cell, episode.question), episode)
    return list(chosen.values())


# Texts


class _Line(NamedTuple):
    """Summary of all episodes at one β."""

    beta: float
    episodes: int
    right: float  # percent correct
    tokens: float
    after: float  # percent of tokens spent after the answer took the lead for good
    faults: list[float]  # percent of episodes by fault, without WASTED

    def __str__(self) -> str:
        faults = "".join(f"{share:9.1f}" for share in self.faults)
        return f"{self.beta:5.2f}{self.episodes:10d}{self.right:9.1f}{self.tokens:11,.0f}{self.after:9.1f}{faults}"


def _overview(studied: Sequence[StudiedEpisode], cells: int) -> str:
    betas = sorted({one.beta for one in studied})
    lines = [_line(beta, [one for one in studied if one.beta == beta]) for beta in betas]
    return "\n".join(
        [
            f"{len(studied)} episodes over {cells} cell{'s' * (cells > 1)}. For each β: percent correct, mean tokens,",
            "percent of tokens spent after the answer took the lead for good, and percent of episodes that ended wrong",
            "because a branch with the correct answer was pruned, it was seen but lost otherwise, or never seen.",
            "    β  episodes  correct     tokens    after   pruned     seen    never",
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


def _describe(episode: StudiedEpisode, title: str) -> str:
    """Describe one episode: why it is shown, its outcome, and some of its rounds."""
    trace = read_trace(episode.path)
    answer = trace.episodes()[episode.at].answer
    answer_text = "nothing" if answer is None else f"{_letter(answer)}, {'correct' if episode.right else 'wrong'}"
    if episode.correct is None:
        correct_text = f"None of {episode.width} branches ever showed the correct answer."
    else:
        correct_text = (
            f"The correct answer is {_letter(episode.correct)}+: of {episode.width} branches {episode.showed} showed it"
        )
        correct_text += f" and {episode.pruned} were pruned while showing it."
    rows, opened = _rounds(trace, episode)
    return "\n".join(
        [
            f"{title}: {episode.fault}.",
            f"It answered {answer_text}. {episode.rounds} rounds, {episode.spent:,} tokens; {episode.running} branches "
            "were still running.",
            f"This answer led for good from round {episode.settled_in} on, {episode.after:,} tokens before the end.",
            f"{correct_text} {episode.chains_right} of {episode.chains} recorded chains end with the correct answer.",
            f"Opened: {opened}.",
            HEADINGS + CONFIDENCES * any("(" in row for row in rows),
            *rows,
        ]
    )


def _rounds(trace: Trace, episode: StudiedEpisode) -> tuple[list[str], str]:
    """Return lines for some of the rounds, and a text that says when branches were opened."""
    rows: list[str] = []
    opened: list[str] = []
    last_votes = ""
    for state, played in trace.states(episode.at):
        new = sum(action.verb is Verb.BRANCH for action in played.actions)
        if new:
            opened.append(f"{new} in round {state.rounds}")
        leaning = Counter(label for i in state.active if (label := state.branches[i].label) is not None)
        votes = "; ".join(
            _votes(counts, episode.correct, confidences)
            for counts, confidences in (
                (state.votes, finished_confidences(state)),
                (leaning, running_confidences(state)),
            )
        )
        row = f"{state.rounds:5d}{len(state.active):9d}{len(state.finished):10d}{state.spent:11,d}  {votes}"
        if votes != last_votes or state.stop is not None:
            rows.append(row)
        last_votes = votes
    more = f", … {len(opened) - ROWS} more times" if len(opened) > ROWS else ""
    return _thinned(rows, ROWS), ", ".join(opened[:ROWS]) + more


def _votes(votes: Mapping[int, int], correct: int | None, confidences: Mapping[int, int], most: int = 4) -> str:
    """List labels by count with the correct one marked: `A 5, C+ 2 …`; with known confidences `A 5 (812), C+ 2 …`."""
    ranked = sorted(votes.items(), key=lambda item: -item[1])
    sure = {label: f" ({confidence})" for label, confidence in confidences.items()}
    texts = [
        f"{_letter(label)}{'+' * (label == correct)} {count}{sure.get(label, '')}" for label, count in ranked[:most]
    ]
    return (", ".join(texts) or "–") + (" …" if len(ranked) > most else "")


def _letter(label: int) -> str:
    """Return the name of a label: A, B, …, Z, A1, … in order of appearance."""
    turn, letter = divmod(label, 26)
    return chr(ord("A") + letter) + (str(turn) if turn else "")


def _thinned(lines: Sequence[T], most: int) -> list[T]:
    """Return at most `most` lines, sampled evenly and including the first and the last."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(at * (len(lines) - 1) / (most - 1))] for at in range(most)]
