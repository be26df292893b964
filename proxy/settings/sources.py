"""Read settings from flags, `AUTOTTS_*` environment variables, a TOML file and defaults, in this order."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from discovery.errors import problem_text
from proxy.errors import SettingsError
from proxy.settings import checks
from proxy.settings.model import Settings, is_secret

EMBEDDED: Final = {"interval": 32, "finalise_tokens": 48, "probe_tokens": 8}
"""Defaults for the embedded model, whose chains have a few hundred tokens."""
SERVED: Final = {"store": Path("autotts.db")}
"""Defaults of `autotts serve`, which records requests by default."""
PREFIX: Final = "AUTOTTS_"
FILE: Final = Path("autotts.toml")
"""Settings file that is read if it exists and no other file is named."""
OF_OTHERS: Final = frozenset({"AUTOTTS_CONFIG", "AUTOTTS_EXPLORER_API_KEY"})
"""Variables with the prefix AUTOTTS_ that are not settings of the proxy."""
PLACES: Final = ("store", "registry", "spill", "keys")
"""Settings that other commands than `serve` read too, from their environment variables."""
FLAG, ENVIRONMENT, EMBEDDED_DEFAULT, DEFAULT = "flag", "environment", "embedded default", "default"
"""Sources of a setting, in addition to a file."""


_ADVICE: Final = {
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "int_parsing": "write a whole number",
    "int_from_float": "write a whole number",
    "int_type": "write a whole number",
    "float_parsing": "write a number",
    "float_type": "write a number",
    "path_type": "write a path, in quotes",
}
"""Instructions for values of the wrong type, by the type of pydantic's error."""


class Configured(NamedTuple):
    """The settings with their sources."""

    settings: Settings
    sources: Mapping[str, str]  # by setting: FLAG, ENVIRONMENT, `file NAME`, EMBEDDED_DEFAULT or DEFAULT


def load(**overrides: object) -> Settings:
    """Return settings from flags (`overrides`; None means not given) and the environment. Raises SettingsError."""
    return configure(None, overrides).settings


def find_file(named: Path | None = None) -> Path | None:
    """Return the file of settings: the one `named` here or by AUTOTTS_CONFIG, else `FILE` if it exists."""
    if named is None and (variable := os.environ.get(f"{PREFIX}CONFIG")):
        named = Path(variable)
    return named or (FILE if FILE.exists() else None)


def configure(file: Path | None, flags: Mapping[str, object], defaults: Mapping[str, object] = {}) -> Configured:
    """Return settings from `flags`, the environment, a TOML file and `defaults`. Earlier sources override later ones.

    A flag that is None was not given. `defaults` override the defaults of the model. Raises SettingsError, which names
    for each problem the setting and its source.
    """
    configured, problems = inspect(file, flags, defaults)
    if configured is None or problems:
        raise SettingsError(*problems)
    return configured


def inspect(
    file: Path | None, flags: Mapping[str, object], defaults: Mapping[str, object] = {}
) -> tuple[Configured | None, list[str]]:
    """Return the settings like `configure`, without unknown ones, and all problems. None if a value is invalid.

    Raises SettingsError if the file cannot be read.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    in_file = {} if file is None else _parse(file)
    problems = [*_unknown(given, ""), *_unknown(in_file, f"{file}: ")]
    given, in_file = (
        {name: value for name, value in source.items() if name in Settings.model_fields} for source in (given, in_file)
    )
    variables = {name.upper() for name, value in os.environ.items() if value}
    in_environment = {name for name in Settings.model_fields if PREFIX + name.upper() in variables}
    sources = dict.fromkeys(Settings.model_fields, DEFAULT)
    sources |= dict.fromkeys(in_file, f"file {file}")
    sources |= dict.fromkeys(in_environment, ENVIRONMENT)
    sources |= dict.fromkeys(given, FLAG)
    in_file = {name: value for name, value in in_file.items() if name not in in_environment}
    try:
        settings = Settings(**{**in_file, **given})
    except ValidationError as error:
        return None, [*problems, *_invalid(error, sources)]
    unset = {name: value for name, value in defaults.items() if sources[name] == DEFAULT}
    if settings.upstream is None:
        embedded = {name: value for name, value in EMBEDDED.items() if sources[name] == DEFAULT}
        sources |= dict.fromkeys(embedded, EMBEDDED_DEFAULT)
        unset |= embedded
    settings = settings.model_copy(update=unset)
    if not settings.record:  # the registry stays where it is
        settings = settings.model_copy(update={"registry": settings.registry_place, "store": None})
    for line in checks.find_problems(settings):
        name, _, problem = line.partition(": ")
        problems.append(f"{_place((name,), sources)}: {problem}")
    return Configured(settings, sources), problems


def export_places() -> None:
    """Set the variables of the places that only the settings file names, for commands that read variables.

    Raises SettingsError.
    """
    file = find_file()
    if file is None or all(map(_variable, PLACES)):
        return
    in_file = _read(file)
    for name in PLACES:
        value = in_file.get(name)
        if value is None or _variable(name):
            continue
        if not isinstance(value, str):
            raise SettingsError(f"{file}: {name}: write it in quotes")
        os.environ[PREFIX + name.upper()] = value


def find_secret(name: str) -> str | None:
    """Return a secret setting from the environment, else from the settings file. Raises SettingsError."""
    if variable := _variable(name):
        return variable
    file = find_file()
    value = None if file is None else _read(file).get(name)
    return value if isinstance(value, str) else None


def unknown_variables() -> list[str]:
    """Return a sentence about each AUTOTTS_ variable that is no setting."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OF_OTHERS
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    return [f"{name} is not a setting and has no effect{_hint(name, known)}" for name in unknown]


def _hint(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _variable(name: str) -> str | None:
    """Return the value of a setting's environment variable; None if it is unset or empty."""
    known = PREFIX + name.upper()
    return next((value for key, value in os.environ.items() if key.upper() == known and value), None)


def _read(file: Path) -> dict[str, Any]:
    """Return the settings in a TOML file. Raises SettingsError, also for unknown settings."""
    in_file = _parse(file)
    if problems := _unknown(in_file, f"{file}: "):
        raise SettingsError(*problems)
    return in_file


def _parse(file: Path) -> dict[str, Any]:
    """Return the content of a TOML file. Raises SettingsError."""
    try:
        with file.open("rb") as opened:
            return tomllib.load(opened)
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        advice = 'lines are NAME = VALUE, with texts in quotes: beta = 0.5, model = "NAME"'
        raise SettingsError(f"{file}: {error}; {advice}") from None


def _unknown(given: Iterable[str], where: str) -> list[str]:
    """Return a problem for each name that is no setting; `where` is the beginning of each."""
    lines = []
    for name in given:
        if name not in Settings.model_fields:
            hint = _hint(name.lower().removeprefix(PREFIX.lower()), Settings.model_fields)
            way = hint or "; `autotts config show` lists the settings"
            lines.append(f"{where}there is no setting {name!r}{way}")
    return lines


def _invalid(error: ValidationError, sources: Mapping[str, str]) -> list[str]:
    return [
        _message(tuple(map(str, e["loc"])), _problem(e), e["input"], sources) for e in error.errors(include_url=False)
    ]


def _problem(error: ErrorDetails) -> str:
    """Return the problem of a value. For a wrong format, that is the description of the setting."""
    name = str(error["loc"][0]) if error["loc"] else ""
    field = Settings.model_fields.get(name)
    if error["type"] == "string_pattern_mismatch" and field is not None and field.description:
        return f"it must be: {field.description}"
    if name == "keys" and isinstance(error["input"], dict):
        return "write the path of the key file, in quotes; the keys themselves belong in that file"
    if error["type"] in _ADVICE:
        return _ADVICE[error["type"]]
    return problem_text(error)


def _message(place: tuple[str, ...], problem: str, value: object, sources: Mapping[str, str]) -> str:
    """Return the message about an invalid value: source, name, problem, and the value unless it is secret."""
    name = place[0] if place else ""
    may_have_password = any(sign in str(value) for sign in ("@", "://"))  # as in the URL of a database
    is_named = isinstance(value, str) and value in problem  # as the file that cannot be read
    is_shown = name in Settings.model_fields and not is_secret(name) and not may_have_password and not is_named
    is_shown = is_shown and not isinstance(value, dict)  # a table may hold anything
    shown = f", not {value!r}" if is_shown else ""
    return f"{_place(place, sources)}: {problem}{shown}"


def _place(place: tuple[str, ...], sources: Mapping[str, str]) -> str:
    """Return the name of a setting, with the file that holds it or its environment variable."""
    name = place[0] if place else ""
    source = sources.get(name, DEFAULT)
    where = f"{source.removeprefix('file ')}: " if source.startswith("file ") else ""
    variable = f" ({PREFIX}{name.upper()})" if source == ENVIRONMENT else ""
    return f"{where}{'.'.join(place)}{variable}"
