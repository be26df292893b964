"""`autotts trace`: show an episode round by round."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
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
    summarise_round,
)
from discovery.audit.vote_margin import describe_agreement, format_branch_count
from discovery.commands.console import add_plain_row, print_plain, wide_console
from discovery.commands.options import DEFAULT_STORE, AsJson, Place
from discovery.commands.store import with_store
from discovery.data.traces import Trace, read_trace, trace_files
from discovery.errors import TraceError
from discovery.store import ServedEpisode, Store, StorePlace

BARS: Final = "·▁▂▃▄▅▆▇█"
"""Bars from no votes to the largest count."""
LEAST: Final = 12
"""Minimum rounds that bars are drawn for."""
WIDEST: Final = 60
"""Maximum rounds that bars are drawn for; longer episodes are sampled evenly."""
BESIDE: Final = 24
"""Terminal columns used for neither bars nor answers."""
ANSWERS: Final = 8
"""Maximum answers that bars are drawn for."""
LONGEST: Final = 40
"""Maximum characters of an answer that are shown."""
BY_ROUND: Final = ("votes by round", "leaning by round")
LEFT: Final = frozenset({"actions", "votes", "leaning", "answer", "state when pruned", *BY_ROUND})
"""Headings of left-aligned columns."""

trace = typer.Typer(name="trace", no_args_is_help=True, help="Inspect replayed and served episodes.")


@trace.callback()
def _trace() -> None:
    """Inspect episodes: replayed ones written by `autotts evaluate --traces`, and served ones from a store."""


@trace.command()
def show(
    path: Annotated[Path, typer.Argument(help="trace file, folder of trace files, or a request id, the client's too")],
    question: Annotated[
        int | None, typer.Option(min=0, help="position of the question in its benchmark (default: list all questions)")
    ] = None,
    shuffle: Annotated[int, typer.Option(min=0, help="branch order to show")] = 0,
    place: Place = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show one episode round by round, or list the questions of trace files."""
    if question is None and not os.path.exists(path):  # also False for ids that cannot be file names
        _show_served(_find(str(path), place), as_json)
        return
    if as_json:
        raise TraceError(f"{path}: --json works only with ids of served requests")
    files = trace_files(path)
    console = wide_console()
    if question is None:
        for file in files:
            console.print(_overview(read_trace(file)))
        return
    count = 0
    for file in files:
        file_trace = read_trace(file)
        for at, episode in enumerate(file_trace.episodes()):
            if (episode.question, episode.shuffle) == (question, shuffle):
                console.print(_episode(file_trace, at))
                count += 1
    if not count:
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
    outcome = "no answer" if episode.answer is None else f"answer {episode.answer}"
    title = f"{_title(read)}, question {episode.question}, shuffle {episode.shuffle}: {outcome}, "
    rounds = (summarise_round(state, played) for state, played in read.states(at))
    return _rounds(title + ("right" if episode.right else "wrong"), rounds)


# Served episodes


def _find(request: str, place: StorePlace) -> ServedEpisode:
    """Return the episode of a request. Raises TraceError, or StoreError if the store cannot be read."""

    async def find(opened: Store) -> ServedEpisode | None:
        return await opened.episode(request) or next(iter(await opened.latest(1, client_id=request)), None)

    if isinstance(place, Path) and not place.exists():
        raise TraceError(
            f"{request}: not a file or folder, and the store {place} does not exist; name a store with --store"
        )
    episode = with_store(place, find)
    if episode is None:
        raise TraceError(
            f"{request}: not a file or folder, and not a request in the store {place}; use the x-request-id of the "
            "response, or name another store with --store"
        )
    return episode


def _show_served(episode: ServedEpisode, as_json: bool) -> None:
    explanation = explain(episode)
    if as_json:
        sys.stdout.write(json.dumps(explanation, indent=2) + "\n")
        return
    console = wide_console()
    print_plain(console, _heading(explanation))
    if explanation["rounds"]:
        console.print(_rounds("rounds", explanation["rounds"]))
    if any(item["votes"] or item["leaning"] for item in explanation["rounds"]):
        console.print(_vote_course(explanation["rounds"], console.width))
    if explanation["pruned"]:
        console.print(_pruned_table(explanation["pruned"]))
    print_plain(console, _bill(explanation))
    if sentence := describe_agreement(explanation["agreement"], explanation["confidence"]):
        print_plain(console, sentence + (" It was flagged." if explanation["flagged"] else ""))
    if explanation["estimates"]:
        print_plain(console, _estimates(explanation["estimates"]))
    print_plain(console, explanation["why"], style="bold")


def _heading(explanation: Explanation) -> str:
    controller = f"{explanation['controller']} ({explanation['digest'][:12]})"
    served_by = f"{controller}, β = {explanation['beta']:g}, {explanation['model']}"
    measured = f", signals: {', '.join(explanation['signals'])}" if explanation["signals"] else ""
    return f"{explanation['request']}, {explanation['created'][:19]}: {served_by}{measured}"


def _bill(explanation: Explanation) -> str:
    kinds = ", ".join(f"{kind} {tokens:,}" for kind, tokens in explanation["ledger"].items() if tokens)
    return f"{explanation['tokens']:,} tokens were spent" + (f": {kinds}." if kinds else ".")


def _vote_course(rounds: Sequence[RoundSummary], width: int) -> Table:
    """Return a table of the votes over time: one row per answer, with a bar per round and the final count."""
    names = {item["label"]: _clipped(item["answer"]) for at in rounds for item in (*at["votes"], *at["leaning"])}
    columns = min(len(rounds), WIDEST, max(LEAST, (width - max(map(len, names.values())) - BESIDE) // 2))
    sampled = [rounds[-1 - at * len(rounds) // columns] for at in range(columns)][::-1]
    series = {
        label: tuple([_count(at[which], label) for at in sampled] for which in ("votes", "leaning")) for label in names
    }
    ranked = sorted(series, key=lambda label: [-max(counts) for counts in series[label]])
    most = max(max(counts) for both in series.values() for counts in both)
    title = "answers by votes" + ("" if len(ranked) <= ANSWERS else f", the first {ANSWERS} of {len(ranked)}")
    table = _table(title, "answer", *BY_ROUND)
    for label in ranked[:ANSWERS]:
        add_plain_row(table, names[label], *(f"{_bars(counts, most)} {counts[-1]}" for counts in series[label]))
    return table


def _count(ballots: Iterable[Ballot], label: int) -> int:
    return next((item["count"] for item in ballots if item["label"] == label), 0)


def _bars(counts: Sequence[int], most: int) -> str:
    return "".join(BARS[-(-count * (len(BARS) - 1) // max(1, most))] for count in counts)


def _pruned_table(pruned: Sequence[PrunedBranch]) -> Table:
    table = _table("pruned branches", "round", "branch", "tokens", "state when pruned")
    for branch in pruned:
        add_plain_row(table, str(branch["round"]), str(branch["branch"]), f"{branch['tokens']:,}", branch["why"])
    return table


def _estimates(estimates: Sequence[ConsistencyEstimate]) -> str:
    first = estimates[0]
    rests = format_branch_count(first["finished"], "finished")
    if first["unfinished"]:
        rests += f" and {first['unfinished']} unfinished ones"
    costs = ", ".join(f"{item['estimated_tokens']:,} with {item['chains']}" for item in estimates)
    least = "at least " if first["at_least"] else ""
    return f"Estimated tokens of self-consistency, from {rests}: {least}{costs} chains."


# Replayed and served episodes


def _rounds(title: str, rounds: Iterable[RoundSummary]) -> Table:
    table = _table(title, "round", "actions", "finished", "running", "votes", "leaning", "tokens")
    for entry in rounds:
        counts = str(entry["finished"]), str(entry["running"]), _votes(entry["votes"]), _votes(entry["leaning"])
        add_plain_row(table, str(entry["number"]), _actions(entry), *counts, f"{entry['tokens']:,}")
    return table


def _actions(entry: RoundSummary) -> str:
    """Summarize the actions of a round: `branch 8; advance 12; probe 4; prune 5, 9`."""
    counted = (("branch", entry["opened"]), ("advance", entry["advanced"]), ("probe", entry["asked"]))
    parts = [f"{name} {len(ids)}" for name, ids in counted if ids]
    if entry["pruned"]:
        parts.append(f"prune {', '.join(map(str, entry['pruned']))}")
    parts += ["answer" + ("" if answer is None else f" {_clipped(answer)}") for answer in entry["answered"]]
    return ("baseline: " if entry["baseline"] else "") + "; ".join(parts)


def _votes(ballots: Sequence[Ballot], most: int = 4) -> str:
    """List answers with their counts, highest first: `3: 12, 0: 2 …`.

    Where the mean confidence is known, it is shown in per mille: `3: 12 (812)`.
    """
    sure = [f" ({item['confidence']})" if "confidence" in item else "" for item in ballots]
    shown = zip(ballots[:most], sure, strict=False)
    text = ", ".join(f"{_clipped(item['answer'])}: {item['count']}{confidence}" for item, confidence in shown)
    return text + (" …" if len(ballots) > most else "")


def _clipped(answer: str) -> str:
    return answer if len(answer) <= LONGEST else f"{answer[: LONGEST - 1]}…"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=Text(printable(title)), title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    return table
