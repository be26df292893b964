"""`autotts requests`: list the requests a proxy has served, as recorded in its store."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from controllers import Stop
from discovery.commands.console import add_plain_row, wide_console
from discovery.commands.options import DEFAULT_STORE, AsJson, Place
from discovery.commands.store import with_store
from discovery.store import Feedback, ServedEpisode, Store

HEADINGS = (
    "ended (UTC)",
    "request",
    "client's id",
    "key",
    "model",
    "controller",
    "β",
    "stop",
    "branches",
    "tokens",
    "feedback",
)
RIGHT = ("β", "branches", "tokens")
UNBROKEN = ("ended (UTC)", "request", "key", "controller")
"""Columns whose cells keep to one line, so that users can search the list. Narrow terminals keep only the ids whole."""
UNBROKEN_WIDTH = 160
"""Minimum width of a terminal that has room for them."""

SHOWN_CHARS = 8
"""Characters of a tenant's hash that the table shows."""
STOPS = (*Stop, "disconnected", "draining", "failed")
"""Why a request ended: the stop reasons of episodes, and those of requests without a reply."""
RECORDER = "everything"
"""Controller of the requests of `autotts collect`, which would push clients' requests off the list."""

requests = typer.Typer(name="requests", no_args_is_help=True, help="Inspect requests that a proxy has served with β.")


@requests.callback()
def _requests() -> None:
    """Inspect requests that a proxy has served with β; explain one with `autotts trace show ID`."""


@requests.command("list")
def list_requests(
    place: Place = DEFAULT_STORE,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="maximum number of requests, latest first")] = 20,
    model: Annotated[str | None, typer.Option(help="only requests to this model")] = None,
    client_id: Annotated[
        str | None, typer.Option("--client-id", help="only requests with this client x-request-id")
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="only requests of this key: its tenant in `autotts keys list`, or the beginning of that"),
    ] = None,
    stop: Annotated[
        str | None, typer.Option(help=f"only requests that ended for this reason: {', '.join(STOPS)}")
    ] = None,
    with_recordings: Annotated[
        bool, typer.Option("--all", help=f"also requests that only record branches (controller {RECORDER})")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the latest requests with their cost and feedback."""
    if stop is not None and stop not in STOPS:
        raise typer.BadParameter(f"{stop!r} is not one of {', '.join(STOPS)}", param_hint="--stop")
    hidden = None if with_recordings or client_id is not None else RECORDER
    beginning = None if tenant is None else tenant.removeprefix("#")

    async def read(opened: Store) -> list[tuple[ServedEpisode, list[Feedback]]]:
        latest = await opened.latest(limit, model, client_id, hidden, beginning, stop)
        return [(episode, await opened.feedback(episode.request_id)) for episode in latest]

    rows = [_figures(episode, feedback) for episode, feedback in with_store(place, read)]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return
    left_out = {
        *(["client's id"] if not any(row["client_request_id"] for row in rows) else []),
        *(["key"] if not any(row["tenant"] for row in rows) else []),
    }
    console = wide_console()
    unbroken = UNBROKEN if console.width >= UNBROKEN_WIDTH else ("request",)
    table = Table(title=str(place), title_justify="left")
    for heading in HEADINGS:
        if heading not in left_out:
            right = heading in RIGHT
            table.add_column(
                heading, justify="right" if right else "left", overflow="fold", no_wrap=heading in unbroken
            )
    for row in rows:
        feedback = ", ".join(f"{kind} {value}" for kind, value in row["feedback"].items())
        key = f"#{row['tenant'][:SHOWN_CHARS]}" if row["tenant"] else ""
        names = (row["request"], row["client_request_id"] or "", key, row["model"], row["controller"])
        about = (f"{row['beta']:g}", row["stop"], str(row["branches"]), f"{row['tokens']:,}", feedback)
        cells = zip(HEADINGS, (row["created"][:19], *names, *about), strict=True)
        add_plain_row(table, *(cell for heading, cell in cells if heading not in left_out))
    console.print(table)
    if not rows:
        console.print("no requests", highlight=False)


def _figures(episode: ServedEpisode, feedback: list[Feedback]) -> dict[str, Any]:
    return {
        "request": episode.request_id,
        "client_request_id": episode.about.get("client_request_id"),
        "tenant": episode.tenant,
        "created": episode.created,
        "model": episode.model,
        "controller": episode.controller,
        "beta": episode.beta,
        "stop": episode.stop,
        "branches": episode.branches,
        "rounds": episode.rounds,
        "tokens": sum(episode.ledger.values()),
        "seconds": episode.about.get("seconds"),
        "signals": list(episode.about.get("signals", ())),
        "feedback": _values(feedback),
    }


def _values(feedback: list[Feedback]) -> dict[str, Any]:
    """Return the latest value of each kind of feedback."""
    return {opinion.kind: json.loads(opinion.value) for opinion in feedback}
