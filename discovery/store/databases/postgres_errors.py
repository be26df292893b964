"""Errors of PostgreSQL and its driver, as errors of the store. No message holds a password or a value of a row."""

from __future__ import annotations

from typing import Any, Final

from discovery.errors import StoreError, UnstorableValue, install_hint
from discovery.store.databases.places import DatabaseUrl

_MISSING_DRIVER: Final = f"a store in PostgreSQL needs the extra `postgres`; {install_hint('postgres')}"
_LOST: Final = ("08", "57P")
"""Beginnings of codes of errors that end a connection."""
_VALUES: Final = ("22", "23", "54")
"""Beginnings of codes of errors in a value: its form, a rule of its table, or a limit, such as that of an index."""
_HINTS: Final = {
    "28P01": "set the right one in the URL of AUTOTTS_STORE, in PGPASSWORD or in the password file ~/.pgpass",
    "28000": "check the user, and pg_hba.conf on the server",
    "3D000": "create it with `createdb`, or name another in the URL",
    "42501": "grant the user the rights to create and write tables",
    "55P03": "another process is writing; try again",
}
"""Ways out, by code."""


def import_driver(url: DatabaseUrl) -> Any:
    """Return the module of the driver. Raises StoreError if it is not installed."""
    try:
        import asyncpg
    except ImportError:
        raise StoreError(f"{url}: {_MISSING_DRIVER}") from None
    return asyncpg


def is_lost(error: Exception) -> bool:
    """Return whether an error means that the connection has ended."""
    is_lost_socket = isinstance(error, OSError) and not isinstance(error, TimeoutError)
    return is_lost_socket or _code(error).startswith(_LOST)


def to_store_error(url: DatabaseUrl, error: Exception) -> Exception:
    """Return the error to raise for an error of the driver."""
    if isinstance(error, StoreError):
        return error
    code = _code(error)
    if isinstance(error, (UnicodeEncodeError, OverflowError)):
        return UnstorableValue(f"{url}: {error}")
    if code.startswith(_VALUES):
        return UnstorableValue(f"{url}: a value cannot be stored: {_summary(error)}")
    if isinstance(error, TimeoutError):
        return StoreError(f"{url}: the server does not answer; check that it runs and can be reached")
    if isinstance(error, OSError):
        return StoreError(f"{url}: cannot reach the server: {error.strerror or error}; check that it runs")
    if not code and not _is_of_driver(error):
        return error
    hint = f"; {_HINTS[code]}" if code in _HINTS else ""
    return StoreError(f"{url}: {_summary(error)}{hint}")


def _code(error: Exception) -> str:
    """Return the SQLSTATE of an error, or an empty text."""
    code = getattr(error, "sqlstate", None)
    if isinstance(code, str):
        return code
    return "22" if _is_of_driver(error) and "DataError" in type(error).__name__ else ""


def _is_of_driver(error: Exception) -> bool:
    return type(error).__module__.startswith("asyncpg.")


def _summary(error: Exception) -> str:
    """Return the first line of an error. The driver's own errors about values quote them, so only the kind is named."""
    name = type(error).__name__
    if _code(error).startswith(_VALUES):
        column = getattr(error, "column_name", None)
        return f"{name} in column {column}" if column else name
    return (str(error).splitlines() or [name])[0]
