"""`autotts registry`: copy a registry and a ledger, from files to PostgreSQL or back."""

from __future__ import annotations

from typing import Annotated

import typer

from discovery.commands.console import wide_console
from discovery.commands.options import AnyPlace, parse_ledger, parse_registry
from discovery.commands.promote import default_ledger
from discovery.promotion.copying import copy_ledger, copy_registry
from discovery.promotion.ledger import Ledger
from discovery.promotion.registry import Registry

registry = typer.Typer(name="registry", no_args_is_help=True, help="Copy the registry and the gate's ledger.")


@registry.command("copy")
def copy(
    source: Annotated[
        AnyPlace,
        typer.Argument(parser=parse_registry, metavar="FROM", help="registry to copy"),
    ],
    target: Annotated[
        AnyPlace,
        typer.Argument(
            parser=parse_registry,
            metavar="TO",
            help="folder or database without a registry",
        ),
    ],
) -> None:
    """Copy a registry, and the ledger that `promote --recordings` keeps with it, and compare both with the copies."""
    content = copy_registry(Registry(source), Registry(target))
    copied = f"{len(content.controllers)} controllers, {len(content.audit)} changes"
    ledger = default_ledger(source)
    if Ledger(ledger).lines():
        copied += f", {copy_ledger(Ledger(ledger), Ledger(default_ledger(target)))} judgements"
    wide_console().print(f"{target}: {copied}; all are as in {source}", highlight=False, markup=False)


@registry.command("copy-ledger")
def copy_judgements(
    source: Annotated[
        AnyPlace,
        typer.Argument(parser=parse_ledger, metavar="FROM", help="ledger to copy"),
    ],
    target: Annotated[
        AnyPlace,
        typer.Argument(parser=parse_ledger, metavar="TO", help="file or database with an empty ledger"),
    ],
) -> None:
    """Copy a ledger that `gate --ledger` keeps, and compare it with the copy."""
    count = copy_ledger(Ledger(source), Ledger(target))
    wide_console().print(f"{target}: {count} judgements; all are as in {source}", highlight=False, markup=False)
