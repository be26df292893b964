"""Read settings from flags, `AUTOTTS_*` environment variables, a TOML file and defaults, in this order."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

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
FLAG, ENVIRONMENT, EMBEDDED_DEFAULT, DEFAULT = "flag", "environment", "embedded default", "default"
"""Sources of a setting, in addition to a file."""


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
    the setting, its source and the problem.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    _refuse_unknown(given, "")
    in_file = {} if file is None else _read(file)
    in_environment = {name for name in Settings.model_fields if _variable(name)}
    sources = dict.fromkeys(Settings.model_fields, DEFAULT)
    sources |= dict.fromkeys(in_file, f"file {file}")
    sources |= dict.fromkeys(in_environment, ENVIRONMENT)
    sources |= dict.fromkeys(given, FLAG)
    in_file = {name: value for name, value in in_file.items() if name not in in_environment}
    try:
        settings = Settings(**{**in_file, **given})
    except ValidationError as error:
        raise SettingsError(_one_line(error, sources)) from None
    unset = {name: value for name, value in defaults.items() if sources[name] == DEFAULT}
    if settings.upstream is None:
        embedded = {name: value for name, value in EMBEDDED.items() if sources[name] == DEFAULT}
        sources |= dict.fromkeys(embedded, EMBEDDED_DEFAULT)
        unset |= embedded
    if not settings.record:
        unset["store"] = None
    settings = settings.model_copy(update=unset)
    checks.check_controller(settings)
    checks.check_upstream(settings)
    checks.check_limits(settings)
    checks.check_files(settings)
    checks.check_spill_file(settings)
    return Configured(settings, sources)


def _variable(name: str) -> str | None:
    """Return the value of a setting's environment variable; None if it is unset or empty."""
    known = PREFIX + name.upper()
    return next((value for key, value in os.environ.items() if key.upper() == known and value), None)


def _read(file: Path) -> dict[str, Any]:
    """Return the settings in a TOML file. Raises SettingsError."""
    try:
        with file.open("rb") as opened:
            in_file = tomllib.load(opened)
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    _refuse_unknown(in_file, f"{file}: ")
    return in_file


def _refuse_unknown(given: Mapping[str, object], where: str) -> None:
    for name in given:
        if name not in Settings.model_fields:
            near = get_close_matches(name, Settings.model_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{where}there is no setting {name!r}{hint}")


def _one_line(error: ValidationError, sources: Mapping[str, str]) -> str:
    return "; ".join(
        _message(tuple(map(str, e["loc"])), _problem(e), e["input"], sources) for e in error.errors(include_url=False)
    )


def _problem(error: ErrorDetails) -> str:
    """Return the problem of a value. For a wrong format, that is the description of the setting."""
    name = str(error["loc"][0]) if error["loc"] else ""
    field = Settings.model_fields.get(name)
    if error["type"] == "string_pattern_mismatch" and field is not None and field.description:
        return f"it must be: {field.description}"
    return error["msg"].removeprefix("Value error, ")


def _message(place: tuple[str, ...], problem: str, value: object, sources: Mapping[str, str]) -> str:
    """Return the message about an invalid value: source, name, problem, and the value unless it is secret."""
    name = place[0] if place else ""
    source = sources.get(name, DEFAULT)
    where = f"{source.removeprefix('file ')}: " if source.startswith("file ") else ""
    variable = f" ({PREFIX}{name.upper()})" if source == ENVIRONMENT else ""
    has_password = name in ("upstream", "store") and any(sign in str(value) for sign in ("@", "://"))
    is_shown = name in Settings.model_fields and not is_secret(name) and not has_password
    shown = f", not {value!r}" if is_shown else ""
    return f"{where}{'.'.join(place)}{variable}: {problem}{shown}"
