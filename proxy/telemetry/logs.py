"""Log lines: for people, or an object each for machines; they say which request they are about, and hold no secret."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from copy import copy
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import SecretStr
from rich.console import Console
from rich.logging import RichHandler

from proxy.settings import LogForm, Settings

MASK: Final = "********"
LEAST: Final = 4
"""Characters of a secret below which hiding it would garble every line."""
ACCESS_LOGGER: Final = "proxy.access"
"""The logger with a line a request."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that is being served here, as its response names it; empty outside of any."""
client_request_id: ContextVar[str] = ContextVar("client_request_id", default="")
"""The client's id of the request; empty if the client sent none."""


def configure_logging(settings: Settings, console: Console) -> None:
    """Have log lines written to `console`'s stream in the form that is set."""
    secrets = tuple(_secrets(settings))
    handler: logging.Handler
    if settings.log is LogForm.JSON:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(JsonFormatter(secrets))
    else:
        if console.file.isatty():
            handler = RichHandler(console=console, markup=False)
            handler.setFormatter(TextFormatter(secrets))
        else:  # rich would fold lines to 80 columns
            handler = logging.StreamHandler(console.file)
            handler.setFormatter(TextFormatter(secrets, "%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger(ACCESS_LOGGER).setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """Lines for people, which name the request they are about."""

    def __init__(self, secrets: Sequence[str] = (), form: str = "%(message)s") -> None:
        super().__init__(form)
        self._secrets = secrets

    def formatMessage(self, record: logging.LogRecord) -> str:
        about = request_id.get()
        if about and about not in record.message:
            record = copy(record)
            record.message = f"{about}: {record.message}"
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record), self._secrets)


class JsonFormatter(logging.Formatter):
    """An object a line: `time`, `level`, `logger`, `message`, what it is about (`request_id`, `client_request_id`), and
    what a line knows besides.

    Of an exception it has the type and where it was raised, not its words: they may be a client's.
    """

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if about := request_id.get():
            told["request_id"] = about
        if named := client_request_id.get():
            told["client_request_id"] = named
        facts = getattr(record, "facts", None)
        if isinstance(facts, Mapping):
            told |= facts
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            told["error"] = type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)
            told["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return hidden(json.dumps(told, ensure_ascii=False, default=str), self._secrets)


def hidden(words: str, secrets: Sequence[str]) -> str:
    """`words` without any of `secrets`."""
    for secret in secrets:
        words = words.replace(secret, MASK)
    return words


def _secrets(settings: Settings) -> Iterator[str]:
    """What no line may hold: secret settings, and the password in the upstream's address."""
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr) and len(value.get_secret_value()) >= LEAST:
            yield value.get_secret_value()
    password = urlsplit(str(settings.upstream or "")).password
    if password and len(password) >= LEAST:
        yield password
