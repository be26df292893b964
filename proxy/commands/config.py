"""Command `autotts config`: show and check the settings that `autotts serve` would use, with their sources."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, NamedTuple, ParamSpec

import typer
from rich.table import Table

from controllers.dial import parse_beta
from discovery.commands.console import wide_console
from discovery.commands.options import AnyPlace, registry_option
from discovery.store.databases.places import parse_place
from proxy.commands.usage_errors import SettingsCommand

if TYPE_CHECKING:
    from proxy.settings import Configured

MASK: Final = "********"
_CREDENTIALS: Final = re.compile(r"://[^/]*@")

File = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of settings; default: AUTOTTS_CONFIG, else autotts.toml"),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="any setting: beta=0.5, or AUTOTTS_BETA=0.5")
]

Flags = Mapping[str, object]
"""Settings from flags, by name. None means that the flag was not given."""
P = ParamSpec("P")

configuring = typer.Typer(name="config", no_args_is_help=True, help="The proxy's settings, and where they come from.")


def _flags(
    upstream: Annotated[
        str | None, typer.Option(help="vLLM's base URL, or several; default: the embedded model is started")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model for requests that name none")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on; default: 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="port to listen on; default: 8400")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="processes that share the port")] = None,
    controller: Annotated[str | None, typer.Option(help="name or FILE.py, for requests that name none")] = None,
    beta: Annotated[str | None, typer.Option(help="β for requests that set none; default: they pass through")] = None,
    interval: Annotated[int | None, typer.Option(min=1, help="tokens of one interval")] = None,
    registry: Annotated[
        AnyPlace | None,
        registry_option("promoted controllers, a folder or a postgresql:// URL; default: the database of such a store"),
    ] = None,
    store: Annotated[
        AnyPlace | None,
        typer.Option(
            parser=parse_place,
            metavar="STORE",
            help="store for recorded requests, a file or a postgresql:// URL; default: autotts.db",
        ),
    ] = None,
    record: Annotated[
        bool | None, typer.Option("--record/--no-record", help="record requests, or none with --no-record")
    ] = None,
    allow_unsandboxed: Annotated[
        bool | None,
        typer.Option("--allow-unsandboxed", help="run controllers from files with all rights of the proxy"),
    ] = None,
    allow_anonymous: Annotated[
        bool | None, typer.Option("--allow-anonymous", help="listen beyond loopback without keys")
    ] = None,
) -> Flags:
    """Return the settings that have their own flags."""
    values = dict(locals())
    return {**values, "beta": None if beta is None else parse_beta(beta, "--beta")}


def with_flags(verb: Callable[Concatenate[Flags, P], None]) -> Callable[..., None]:
    """Wrap a command so that it accepts the flags of `serve` and gets their settings as its first argument."""
    flags, own = (signature(function, eval_str=True).parameters for function in (_flags, verb))

    @wraps(verb)
    def with_settings(**arguments: Any) -> None:
        from_flags = {name: arguments.pop(name) for name in flags}
        verb(_flags(**from_flags), **arguments)  # type: ignore[call-arg]

    parameters = [*flags.values(), *list(own.values())[1:]]
    with_settings.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_settings


class SettingRow(NamedTuple):
    """One setting in the table."""

    name: str
    value: Any  # a JSON value; secrets are masked
    source: str
    meaning: str


@configuring.command(cls=SettingsCommand)
@with_flags
def show(
    given: Flags,
    file: File = None,
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Show every setting: its value, its source and its meaning."""
    rows = list(_rows(gather(file, sets, given)))
    if as_json:
        shown = {row.name: {"value": row.value, "source": row.source, "meaning": row.meaning} for row in rows}
        sys.stdout.write(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
        return
    table = Table()
    for heading in ("setting", "value", "source", "meaning"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        value = "" if row.value is None else row.value if isinstance(row.value, str) else json.dumps(row.value)
        table.add_row(row.name, value, row.source, row.meaning)
    wide_console().print(table, markup=False, highlight=False)


@configuring.command(cls=SettingsCommand)
@with_flags
def check(
    given: Flags,
    file: File = None,
    sets: Sets = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with status 1 if there is a warning")] = False,
) -> None:
    """Check whether `autotts serve` could start with these settings. Every problem is a line.

    Warnings are of unknown AUTOTTS_ variables, of files that other users can read, of a store that cannot be written
    to, and those that `autotts serve` logs as it starts, such as of limits that are too small.
    """
    from deploy.embedded import server
    from proxy.admission.auth import Authenticator, check_host
    from proxy.app import create_app
    from proxy.errors import SettingsError
    from proxy.settings import (
        DEFAULT,
        EMBEDDED_DEFAULT,
        SERVED,
        Settings,
        find_file,
        inspect,
        problems_of,
        unknown_variables,
    )
    from proxy.settings.file_warnings import logged_warnings, secret_warnings, store_warnings
    from proxy.workers.shares import of_worker

    configured, problems = inspect(find_file(file), _given(sets, given), SERVED)
    if configured is None:
        raise SettingsError(*problems)
    settings = configured.settings
    if settings.upstream is None and (problem := server.problem()):
        problems.append(f"upstream: none is set, and the embedded model cannot start: {problem}")
    served = settings if settings.upstream else settings.model_copy(update={"upstream": "http://embedded"})
    with logged_warnings() as logged:
        problems += problems_of(partial(check_host, settings), partial(create_app, of_worker(served)))
        if problems:  # of those that the app raises, this is the first; one of the key file may follow
            problems += problems_of(partial(Authenticator, of_worker(settings)))
    if problems:
        raise SettingsError(*dict.fromkeys(problems))
    console = wide_console()
    read = find_file(file)
    warnings = [*unknown_variables(), *secret_warnings(configured, read), *store_warnings(settings), *logged]
    for warning in warnings:
        console.print(warning, style="yellow", markup=False, highlight=False)
    count = sum(source not in (DEFAULT, EMBEDDED_DEFAULT) for source in configured.sources.values())
    summary = f"the settings are valid: {count} of {len(Settings.model_fields)} set"
    console.print(summary if read is None else f"{summary}, {read} read", markup=False, highlight=False)
    if warnings and strict:
        raise typer.Exit(1)


def gather(file: Path | None, sets: list[str] | None, flags: Flags) -> Configured:
    """Return the settings that `autotts serve` uses. Raises SettingsError, and BadParameter for an invalid --set."""
    from proxy.settings import SERVED, configure, find_file

    return configure(find_file(file), _given(sets, flags), SERVED)


def _given(sets: list[str] | None, flags: Flags) -> Flags:
    """Return the settings on the command line. Raises BadParameter for an invalid --set."""
    from proxy.settings import PREFIX

    given: dict[str, object] = {}
    for assignment in sets or ():
        name, equals, value = assignment.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {assignment}: write NAME=VALUE")
        given[name.strip().lower().replace("-", "_").removeprefix(PREFIX.lower())] = value
    return given | {name: value for name, value in flags.items() if value is not None}


def _rows(configured: Configured) -> Iterator[SettingRow]:
    from proxy.settings import Settings, is_secret

    values = configured.settings.model_dump(mode="json")
    for name, field in Settings.model_fields.items():
        value = _masked(values[name], is_secret(name))
        yield SettingRow(name, value, configured.sources[name], field.description or "")


def _masked(value: Any, secret: bool) -> Any:
    """Return a value with secrets masked, also passwords in URLs."""
    if secret:
        return MASK if value else value
    if isinstance(value, list):
        return [_masked(item, False) for item in value]
    return _CREDENTIALS.sub(f"://{MASK}@", value) if isinstance(value, str) else value
