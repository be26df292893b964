"""Command `autotts keys`: create and list API keys of clients. A key is shown once; only its hash is stored."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from discovery.commands.console import wide_console

LEFT = frozenset({"name", "tenant", "admin", "priority"})
"""Columns of the list that are not numbers."""

keysmith = typer.Typer(
    name="keys", no_args_is_help=True, help="API keys of clients, for the file named by AUTOTTS_KEYS."
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
