"""`autotts trace`: what happened in an episode, round by round."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controllers import Round, State, Verb
from discovery.commands.console import wide_console
from discovery.errors import TraceError
from discovery.traces import Trace, read_trace, trace_files

trace = typer.Typer(name="trace", no_args_is_help=True, help="Look at traces written by `autotts evaluate --traces`.")


@trace.callback()
def _trace() -> None:
    """Look at traces written by `autotts evaluate --traces`."""


@trace.command()
def show(
    path: Annotated[Path, typer.Argument(help="a file of traces, or the folder that holds some")],
    question: Annotated[int | None, typer.Option(min=0, help="position of the question in its benchmark")] = None,
    shuffle: Annotated[int, typer.Option(min=0, help="branch order to show it in")] = 0,
) -> None:
    """One episode round by round; without --question, every question of each file in a line."""
    files = trace_files(path)
    console = wide_console()
    if question is None:
        for file in files:
            console.print(_overview(read_trace(file)))
        return
    shown = 0
    for file in files:
        read = read_trace(file)
        for at, episode in enumerate(read.episodes()):
            if (episode.question, episode.shuffle) == (question, shuffle):
                console.print(_episode(read, at))
                shown += 1
    if not shown:
        raise TraceError(f"{path}: no trace of question {question} under shuffle {shuffle}")


def _title(read: Trace) -> str:
    about = read.about
    return f"{about['controller']}, β = {about['beta']:g}, {about['model']} {about['benchmark']} ({about['split']})"


def _overview(read: Trace) -> Table:
    episodes = read.episodes()
    first, last = read.about["shuffles"][0], read.about["shuffles"][1] - 1
    table = Table(title=f"{_title(read)}, shuffles {first} to {last}", title_justify="left")
    for heading in ("question", "hash", "episodes", "right", "rounds", "actions"):
        table.add_column(heading, justify="right")
    counts = read.arrays["episodes"].tolist()
    for number, digest in enumerate(read.about["questions"]):
        mine = [at for at, episode in enumerate(episodes) if episode.question == number]
        right = sum(episodes[at].right for at in mine)
        rounds, actions = (sum(counts[at][column] for at in mine) / len(mine) for column in (0, 1))
        table.add_row(str(number), digest[:12], str(len(mine)), str(right), f"{rounds:.1f}", f"{actions:.0f}")
    return table


def _episode(read: Trace, at: int) -> Table:
    episode = read.episodes()[at]
    fate = "no answer" if episode.answer is None else f"answer {episode.answer}"
    title = f"{_title(read)}, question {episode.question}, shuffle {episode.shuffle}: {fate}, "
    table = Table(title=title + ("right" if episode.right else "wrong"), title_justify="left")
    for heading in ("round", "what was done", "finished", "running", "votes", "leaning", "tokens"):
        table.add_column(heading, justify="left" if heading in ("what was done", "votes", "leaning") else "right")
    for number, (state, played) in enumerate(read.states(at)):
        running = Counter(state.branches[i].label for i in state.active if state.branches[i].probed)
        table.add_row(
            str(number),
            _done(played, state),
            str(len(state.finished)),
            str(len(state.active)),
            _votes(state.votes),
            _votes({label: count for label, count in running.items() if label is not None}),
            f"{state.spent:,}",
        )
    return table


def _done(played: Round, state: State) -> str:
    """`open 8; run 12 (3 by 3); ask 4; drop 5, 9`."""
    by_verb: dict[Verb, list[int]] = {}
    for action in played.actions:
        by_verb.setdefault(action.verb, []).append(action.branch)
    words = []
    for verb, name in ((Verb.BRANCH, "open"), (Verb.CONTINUE, "run"), (Verb.PROBE, "ask")):
        if verb in by_verb:
            words.append(f"{name} {len(by_verb[verb])}")
    if Verb.PRUNE in by_verb:
        words.append(f"drop {', '.join(map(str, by_verb[Verb.PRUNE]))}")
    if Verb.ANSWER in by_verb:
        words.append("answer" + ("" if state.answer is None else f" {state.answer}"))
    return "; ".join(words)


def _votes(votes: dict[int, int], most: int = 4) -> str:
    """`3: 12, 0: 2 …`: labels by falling count."""
    ranked = sorted(votes.items(), key=lambda one: -one[1])
    return ", ".join(f"{label}: {count}" for label, count in ranked[:most]) + (" …" if len(ranked) > most else "")
