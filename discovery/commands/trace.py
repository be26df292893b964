"""`autotts trace`: what happened in an episode, round by round."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from controllers.sandbox.frames import printable
from discovery.audit.explain import (
    Ballot,
    ConsistencyEstimate,
    Explanation,
    PrunedBranch,
    RoundSummary,
    explain,
    format_branch_count,
    summarise_round,
)
from discovery.commands.console import wide_console
from discovery.commands.store import DEFAULT, AsJson, Place
from discovery.data.traces import Trace, read_trace, trace_files
from discovery.errors import TraceError
from discovery.store import ServedEpisode, Store

BARS: Final = "·▁▂▃▄▅▆▇█"
"""From no votes to the most there are."""
LEAST: Final = 12
WIDEST: Final = 60
"""Rounds that bars are drawn for, as wide as the terminal is; of more rounds, so many spread evenly."""
BESIDE: Final = 24
"""Columns of a terminal that are not bars, beside the answers."""
ANSWERS: Final = 8
"""Answers that bars are drawn for."""
LONGEST: Final = 40
"""Characters of an answer that are drawn."""
BY_ROUND: Final = ("votes by round", "leaning by round")
LEFT: Final = frozenset({"what was done", "votes", "leaning", "answer", "how it stood", *BY_ROUND})
"""Columns of words."""

trace = typer.Typer(name="trace", no_args_is_help=True, help="Look at episodes: replayed ones, and served ones.")


@trace.callback()
def _trace() -> None:
    """Look at episodes: those `autotts evaluate --traces` wrote down, and those a store has of served requests."""


@trace.command()
def show(
    path: Annotated[Path, typer.Argument(help="a file of traces, a folder of some, or the id of a served request")],
    question: Annotated[int | None, typer.Option(min=0, help="position of the question in its benchmark")] = None,
    shuffle: Annotated[int, typer.Option(min=0, help="branch order to show it in")] = 0,
    place: Place = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """One episode round by round; of files without --question, every question in a line."""
    if question is None and not os.path.exists(path):  # False, too, of what no file can be called
        _show_served(_find(str(path), place), as_json)
        return
    if as_json:
        raise TraceError(f"{path}: --json tells of served requests, by their ids")
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


# Replayed episodes


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
    told = (summarise_round(state, played) for state, played in read.states(at))
    return _rounds(title + ("right" if episode.right else "wrong"), told)


# Served episodes


def _find(request: str, place: Path) -> ServedEpisode:
    """The episode of a request. Raises TraceError, or StoreError if the store cannot be read."""

    async def find() -> ServedEpisode | None:
        async with Store.open(place) as store:
            return await store.episode(request) or next(iter(await store.latest(1, client_id=request)), None)

    if not place.exists():
        raise TraceError(f"{request}: no file or folder, and there is no store {place} to know it; --store names one")
    episode = asyncio.run(find())
    if episode is None:
        raise TraceError(
            f"{request}: no file or folder, and no request the store {place} knows; a response's x-request-id is its "
            "id, and --store names another store"
        )
    return episode


def _show_served(episode: ServedEpisode, as_json: bool) -> None:
    told = explain(episode)
    if as_json:
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return
    console = wide_console()
    _say(console, _heading(told))
    console.print(_rounds("what happened", told["rounds"]))
    if any(one["votes"] or one["leaning"] for one in told["rounds"]):
        console.print(_course(told["rounds"], console.width))
    if told["pruned"]:
        console.print(_given_up(told["pruned"]))
    _say(console, _bill(told))
    if told["estimates"]:
        _say(console, _estimates(told["estimates"]))
    _say(console, told["why"], style="bold")


def _say(console: Console, words: str, style: str = "") -> None:
    console.print(Text(printable(words)), style=style, soft_wrap=True)


def _heading(told: Explanation) -> str:
    by = f"{told['controller']} ({told['digest'][:12]}), β = {told['beta']:g}, {told['model']}"
    return f"{told['request']}, {told['created'][:19]}: {by}"


def _bill(told: Explanation) -> str:
    kinds = ", ".join(f"{kind} {tokens:,}" for kind, tokens in told["ledger"].items() if tokens)
    return f"{told['tokens']:,} tokens were spent" + (f": {kinds}." if kinds else ".")


def _course(rounds: Sequence[RoundSummary], width: int) -> Table:
    """The votes over time, an answer a row: bars as high as there are votes, and how many there are in the end."""
    names = {one["label"]: _clipped(one["answer"]) for at in rounds for one in (*at["votes"], *at["leaning"])}
    columns = min(len(rounds), WIDEST, max(LEAST, (width - max(map(len, names.values())) - BESIDE) // 2))
    told = [rounds[-1 - at * len(rounds) // columns] for at in range(columns)][::-1]
    series = {
        label: tuple([_count(at[which], label) for at in told] for which in ("votes", "leaning")) for label in names
    }
    ranked = sorted(series, key=lambda label: [-max(counts) for counts in series[label]])
    most = max(max(counts) for both in series.values() for counts in both)
    title = "answers by votes" + ("" if len(ranked) <= ANSWERS else f", the first {ANSWERS} of {len(ranked)}")
    table = _table(title, "answer", *BY_ROUND)
    for label in ranked[:ANSWERS]:
        _row(table, names[label], *(f"{_bars(counts, most)} {counts[-1]}" for counts in series[label]))
    return table


def _count(ballots: Iterable[Ballot], label: int) -> int:
    return next((one["count"] for one in ballots if one["label"] == label), 0)


def _bars(counts: Sequence[int], most: int) -> str:
    return "".join(BARS[-(-count * (len(BARS) - 1) // max(1, most))] for count in counts)


def _given_up(pruned: Sequence[PrunedBranch]) -> Table:
    table = _table("given up", "round", "branch", "tokens", "how it stood")
    for one in pruned:
        _row(table, str(one["round"]), str(one["branch"]), f"{one['tokens']:,}", one["why"])
    return table


def _estimates(found: Sequence[ConsistencyEstimate]) -> str:
    first = found[0]
    rests = format_branch_count(first["finished"], "finished")
    if first["unfinished"]:
        rests += f" and {first['unfinished']} that had at least the length they were run for"
    costs = ", ".join(f"{one['estimated_tokens']:,} with {one['chains']}" for one in found)
    least = "at least " if first["at_least"] else ""
    return f"Estimated tokens of self-consistency, from {rests}: {least}{costs} chains."


# Both


def _rounds(title: str, rounds: Iterable[RoundSummary]) -> Table:
    table = _table(title, "round", "what was done", "finished", "running", "votes", "leaning", "tokens")
    for one in rounds:
        counts = str(one["finished"]), str(one["running"]), _votes(one["votes"]), _votes(one["leaning"])
        _row(table, str(one["number"]), _done(one), *counts, f"{one['tokens']:,}")
    return table


def _done(told: RoundSummary) -> str:
    """`open 8; run 12; ask 4; drop 5, 9`."""
    counted = (("open", told["opened"]), ("run", told["advanced"]), ("ask", told["asked"]))
    words = [f"{name} {len(those)}" for name, those in counted if those]
    if told["pruned"]:
        words.append(f"drop {', '.join(map(str, told['pruned']))}")
    words += ["answer" + ("" if answer is None else f" {_clipped(answer)}") for answer in told["answered"]]
    return ("baseline: " if told["baseline"] else "") + "; ".join(words)


def _votes(ballots: Sequence[Ballot], most: int = 4) -> str:
    """`3: 12, 0: 2 …`: answers by falling count."""
    words = ", ".join(f"{_clipped(one['answer'])}: {one['count']}" for one in ballots[:most])
    return words + (" …" if len(ballots) > most else "")


def _clipped(answer: str) -> str:
    return answer if len(answer) <= LONGEST else f"{answer[: LONGEST - 1]}…"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=Text(printable(title)), title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    return table


def _row(table: Table, *cells: str) -> None:
    """A row of plain text: answers are whatever a model wrote."""
    table.add_row(*(Text(printable(cell)) for cell in cells))
