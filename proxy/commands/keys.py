"""Command `autotts keys`: create and list API keys of clients, and show what they spent.

A key is shown once; only its hash is stored.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.table import Table

from discovery.commands.console import wide_console
from discovery.commands.options import DEFAULT_STORE, AsJson, Place
from discovery.store import StorePlace
from discovery.store.usage.periods import Bucket, Period, UsageTotal
from discovery.store.usage.reader import UsageReader

LEFT = frozenset({"name", "tenant", "admin", "priority"})
"""Columns of the list that are not numbers."""


class KeyUsageRow(NamedTuple):
    """Tokens that the requests of one key spent."""

    key: str  # its name, or the beginning of its tenant
    tenant: str
    requests: int
    tokens: int  # generated, and suffixes of probes
    prompt_tokens: int  # of requests with a reply, without suffixes


keysmith = typer.Typer(
    name="keys",
    no_args_is_help=True,
    help="API keys of clients, in the file named by AUTOTTS_KEYS, and their usage.",
)


@keysmith.command()
def new(
    name: Annotated[str, typer.Argument(help="owner of the key; the tenant is derived from it")],
    admin: Annotated[bool, typer.Option("--admin", help="may see every request and set every field")] = False,
) -> None:
    """Create a key. It is shown once on standard error; the line for the key file goes to standard output."""
    from proxy.admission import api_keys

    token = api_keys.generate_key()
    line = api_keys.key_file_entry(name, token, admin=admin)
    sys.stderr.write(f"{token}\n")
    sys.stdout.write(f"{line}\n")


@keysmith.command("list")
def listing(file: Annotated[Path, typer.Argument(help="key file", envvar="AUTOTTS_KEYS")]) -> None:
    """List the keys of a file: owner, tenant as in the store, and limits."""
    from proxy.admission import api_keys

    table = Table()
    for heading in ("name", "tenant", "admin", "priority", "β", "branches", "tokens", "tokens a minute", "episodes"):
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    for key in api_keys.read_key_file(file):
        rights = ("yes" if is_set else "" for is_set in (key.is_admin, key.has_priority))
        caps = ("" if cap is None else f"{cap:,}" for cap in key.caps)
        beta = "" if key.beta is None else f"{key.beta:g}"
        table.add_row(key.name, key.tenant, *rights, beta, *caps)
    wide_console().print(table, markup=False, highlight=False)


@keysmith.command()
def usage(
    file: Annotated[
        Path | None,
        typer.Argument(help="key file, for names instead of hashes", envvar="AUTOTTS_KEYS"),
    ] = None,
    place: Place = DEFAULT_STORE,
    days: Annotated[int, typer.Option(min=0, max=36_500, help="whole days (UTC) before today that are included")] = 30,
    as_json: AsJson = False,
) -> None:
    """Show what the requests of each key spent that controllers served, from the store."""
    from pydantic import SecretStr

    from proxy.admission import api_keys
    from proxy.settings import find_secret

    key_list = find_secret("client_keys")
    ring = api_keys.load_keyring(file, SecretStr(key_list) if key_list else None)
    keys = () if ring is None else ring.keys
    period = Period.until_now(timedelta(days=days), Bucket.DAY)
    totals, prompts = asyncio.run(_read(place, period))
    names = api_keys.tenant_names(keys, [*totals, *(key.tenant for key in keys)], find_secret("admin_key"))
    nothing = UsageTotal("", 0, 0, 0.0)
    rows = [
        KeyUsageRow(name, tenant, used.requests, used.tokens, prompts[tenant])
        for tenant, name in names.items()
        for used in [totals.get(tenant, nothing)]
    ]
    if as_json:
        figures = [row._asdict() | {"total_tokens": row.tokens + row.prompt_tokens} for row in rows]
        sys.stdout.write(json.dumps({"since": period.bounds[0], "keys": figures}, indent=2) + "\n")
        return
    table = Table(title=f"{place}: tokens since {period.bounds[0]} (UTC)", title_justify="left")
    for heading in ("key", "tenant", "requests", "generated", "prompts", "sum"):
        table.add_column(heading, justify="left" if heading in ("key", "tenant") else "right")
    for row in rows:
        counts = (row.requests, row.tokens, row.prompt_tokens, row.tokens + row.prompt_tokens)
        table.add_row(row.key, row.tenant, *(f"{count:,}" for count in counts))
    wide_console().print(table, markup=False, highlight=False)


async def _read(place: StorePlace, period: Period) -> tuple[dict[str, UsageTotal], Counter[str]]:
    """Return the usage of each tenant in a period, most tokens first, and its prompt tokens. Raises StoreError."""
    async with UsageReader(place) as reader:
        totals = {total.name: total for total in await reader.by_tenant(period)}
        return totals, await reader.prompt_tokens(period)
