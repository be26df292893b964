"""Log formats: plain text or one JSON object per line. Lines name their request, and secrets are redacted."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from copy import copy
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import SecretStr
from rich.console import Console
from rich.logging import RichHandler

from proxy.settings import LogForm, Settings, parse_upstreams

MASK: Final = "********"
MIN_SECRET_CHARS: Final = 4
"""Minimum length of a redacted secret. Redacting shorter ones would garble every line."""
ACCESS_LOGGER: Final = "proxy.access"
"""Name of the logger that writes one line per request."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that is being served, as in its response; empty outside of requests."""
client_request_id: ContextVar[str] = ContextVar("client_request_id", default="")
"""Id that the client sent for the request; empty if there is none."""


def configure_logging(settings: Settings, console: Console) -> None:
    """Write log lines to the stream of `console`, in the configured format."""
    secrets = tuple(_secrets(settings))
    handler: logging.Handler
    if settings.log is LogForm.JSON:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(JsonFormatter(secrets))
    else:
        if console.file.isatty():
            handler = RichHandler(console=console, markup=False)
            handler.setFormatter(TextFormatter(secrets))
        else:  # rich would wrap lines at 80 columns
            handler = logging.StreamHandler(console.file)
            handler.setFormatter(TextFormatter(secrets, "%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger(ACCESS_LOGGER).setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def log_fault(logger: logging.Logger, error: Exception) -> None:
    """Log an unhandled error with its traceback, but without its message, which may quote a request."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unhandled error in the proxy: %s\n%s", type(error).__name__, frames)


class TextFormatter(logging.Formatter):
    """Plain-text log lines. A line within a request begins with the request id."""

    def __init__(self, secrets: Sequence[str] = (), form: str = "%(message)s") -> None:
        super().__init__(form)
        self._secrets = secrets

    def formatMessage(self, record: logging.LogRecord) -> str:
        current_id = request_id.get()
        if current_id and current_id not in record.message:
            record = copy(record)
            record.message = f"{current_id}: {record.message}"
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record), self._secrets)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time`, `level`, `logger`, `message`, `request_id`, `client_request_id` and more facts.

    An exception is logged by its type and traceback, without its message, because that may hold a client's text.
    """

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        if sent := client_request_id.get():
            line["client_request_id"] = sent
        facts = getattr(record, "facts", None)
        if isinstance(facts, Mapping):
            line |= facts
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return redact(json.dumps(line, ensure_ascii=False, default=str), self._secrets)


def redact(text: str, secrets: Sequence[str]) -> str:
    """Return `text` with each of `secrets` replaced by MASK."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text


def _secrets(settings: Settings) -> Iterator[str]:
    """Yield the texts that no log line may contain: secret settings and the passwords in the upstreams' addresses."""
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr) and len(value.get_secret_value()) >= MIN_SECRET_CHARS:
            yield value.get_secret_value()
    passwords = parse_upstreams(settings.upstream).passwords if settings.upstream else []
    yield from (password for password in passwords if len(password) >= MIN_SECRET_CHARS)
