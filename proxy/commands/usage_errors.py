"""Messages about wrong options and arguments, in the words of the other messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from discovery.errors import problem_text
from proxy.errors import SettingsError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class SettingsCommand(TyperCommand):
    """Command that takes settings. It says how to set one that has no flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. Raises SettingsError for an option that is a setting without a flag."""
        from proxy.settings import Settings

        known = {option for parameter in self.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for argument in args:
            option = argument.partition("=")[0]
            name = option.removeprefix("--").replace("-", "_")
            if option.startswith("--") and option not in known and name in Settings.model_fields:
                raise SettingsError(_without_flag(option, name))
        return super().parse_args(ctx, args)


def _without_flag(option: str, name: str) -> str:
    from proxy.settings import PREFIX, is_secret

    variable = f"{PREFIX}{name.upper()}"
    if is_secret(name):
        return f"{option} is no option, because others can see the command line; set {variable}, or {name} in the file"
    return f"{option} is no option; use --set {name}=VALUE, {variable}, or {name} in the settings file"


def describe_bad_parameter(error: typer.BadParameter) -> str:
    """Return the message about a wrong option or argument, with its value."""
    from pydantic import ValidationError

    if isinstance(error.__cause__, ValidationError):
        error.message = _problem(error.__cause__.errors(include_url=False)[0])
    variables = getattr(error.param, "envvar", None)
    if not error.message and isinstance(variables, str):  # it is missing
        return f"{error.format_message().removesuffix('.')}; give it, or set {variables}"
    return error.format_message()


def _problem(details: ErrorDetails) -> str:
    problem, value = problem_text(details), details["input"]
    if not isinstance(value, str | int | float) or repr(value) in problem or str(value) in problem:
        return problem
    limit = details.get("ctx", {}).get("le")
    percent = _number(value)
    advice = f"; write {percent / 100:g} for {percent:g} %" if limit == 1 and percent and 1 < percent <= 100 else ""
    return f"{problem}, not {value}{advice}"


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
