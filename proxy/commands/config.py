"""`autotts config`: every setting as `autotts serve` would have it, and where it comes from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, NamedTuple, ParamSpec
from urllib.parse import urlsplit, urlunsplit

import typer
from rich.table import Table

from controllers.dial import parse_beta
from discovery.commands.console import wide_console

if TYPE_CHECKING:
    from proxy.settings import Configured

MASK: Final = "********"
OF_OTHERS: Final = frozenset({"AUTOTTS_CONFIG", "AUTOTTS_EXPLORER_API_KEY"})
"""Variables that are no settings of the proxy."""

File = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings; AUTOTTS_CONFIG, else autotts.toml if there")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="any setting: beta=0.5, or AUTOTTS_BETA=0.5")
]

Flags = Mapping[str, object]
"""Settings by name, as flags have them; None is not given."""
P = ParamSpec("P")

configuring = typer.Typer(name="config", no_args_is_help=True, help="The proxy's settings, and where they come from.")


def _flags(
    upstream: Annotated[
        str | None, typer.Option(help="vLLM's base URL; without it the embedded model is served")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model for requests that name none")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on; without it 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="port to listen on; without it 8400")] = None,
    controller: Annotated[str | None, typer.Option(help="for requests that name none: a name or FILE.py")] = None,
    beta: Annotated[str | None, typer.Option(help="β for requests that set none; without it they pass through")] = None,
    interval: Annotated[int | None, typer.Option(min=1, help="tokens of one interval")] = None,
    registry: Annotated[Path | None, typer.Option(help="folder of installed controllers, as promoted")] = None,
    store: Annotated[Path | None, typer.Option(help="replay store requests are recorded in, else autotts.db")] = None,
    record: Annotated[
        bool | None, typer.Option("--record/--no-record", help="record requests; with --no-record none is")
    ] = None,
    allow_unsandboxed: Annotated[
        bool | None,
        typer.Option("--allow-unsandboxed", help="give controllers from files the proxy's own rights"),
    ] = None,
    allow_anonymous: Annotated[
        bool | None, typer.Option("--allow-anonymous", help="listen on other addresses than loopback without keys")
    ] = None,
) -> Flags:
    """The settings that have flags of their own."""
    given = dict(locals())
    return {**given, "beta": None if beta is None else parse_beta(beta, "--beta")}


def with_flags(verb: Callable[Concatenate[Flags, P], None]) -> Callable[..., None]:
    """A verb that takes the flags of `serve` as its first parameter, which it is given the settings of."""
    flags, own = (signature(one, eval_str=True).parameters for one in (_flags, verb))

    @wraps(verb)
    def taking(**given: Any) -> None:
        said = {name: given.pop(name) for name in flags}
        verb(_flags(**said), **given)  # type: ignore[call-arg]

    parameters = [*flags.values(), *list(own.values())[1:]]
    taking.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    taking.__annotations__ = {one.name: one.annotation for one in parameters}
    return taking


class Row(NamedTuple):
    """One setting, to be shown."""

    name: str
    value: Any  # as JSON has it; a secret is masked
    source: str
    meaning: str


@configuring.command()
@with_flags
def show(
    given: Flags,
    file: File = None,
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Tell every setting: its value, where that comes from, and what it means."""
    rows = list(_rows(gather(file, sets, given)))
    if as_json:
        told = {row.name: {"value": row.value, "source": row.source, "meaning": row.meaning} for row in rows}
        sys.stdout.write(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        return
    table = Table()
    for heading in ("setting", "value", "source", "meaning"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        value = "" if row.value is None else row.value if isinstance(row.value, str) else json.dumps(row.value)
        table.add_row(row.name, value, row.source, row.meaning)
    wide_console().print(table, markup=False, highlight=False)


@configuring.command()
@with_flags
def check(given: Flags, file: File = None, sets: Sets = None) -> None:
    """Find out whether `autotts serve` could start so. Variables that set nothing are told of."""
    from proxy.admission.auth import check_host
    from proxy.app import create_app
    from proxy.settings import DEFAULT, EMBEDDED_DEFAULT, PREFIX, Settings, find_file

    configured = gather(file, sets, given)
    settings = configured.settings
    check_host(settings)
    create_app(settings if settings.upstream else settings.model_copy(update={"upstream": "http://embedded"}))
    console = wide_console()
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OF_OTHERS
    for name in sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known):
        console.print(f"{name} sets nothing", style="yellow", markup=False, highlight=False)
    count = sum(source not in (DEFAULT, EMBEDDED_DEFAULT) for source in configured.sources.values())
    read = find_file(file)
    words = f"the settings are good: {count} of {len(known - OF_OTHERS)} set"
    console.print(words if read is None else f"{words}, {read} read", markup=False, highlight=False)


def gather(file: Path | None, sets: list[str] | None, flags: Flags) -> Configured:
    """What `autotts serve` goes by. Raises SettingsError, or BadParameter for a `sets` that sets nothing."""
    from proxy.settings import PREFIX, SERVED, configure, find_file

    given: dict[str, object] = {}
    for one in sets or ():
        name, equals, value = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {one}: say NAME=VALUE")
        given[name.strip().lower().replace("-", "_").removeprefix(PREFIX.lower())] = value
    given |= {name: value for name, value in flags.items() if value is not None}
    return configure(find_file(file), given, SERVED)


def _rows(configured: Configured) -> Iterator[Row]:
    from proxy.settings import Settings, is_secret

    values = configured.settings.model_dump(mode="json")
    for name, field in Settings.model_fields.items():
        value = _masked(values[name], is_secret(name))
        yield Row(name, value, configured.sources[name], field.description or "")


def _masked(value: Any, secret: bool) -> Any:
    """A value without what is secret in it; so is a password in a URL."""
    if secret:
        return MASK if value else value
    if isinstance(value, list):
        return [_masked(one, False) for one in value]
    if not isinstance(value, str) or "://" not in value or "@" not in value:
        return value
    parts = urlsplit(value)
    return urlunsplit(parts._replace(netloc=f"{MASK}@{parts.netloc.rpartition('@')[2]}"))
