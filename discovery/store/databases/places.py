"""Where a store is: the path of a SQLite file, or the URL of a PostgreSQL database.

A password is kept apart from the URL, so that no message, log line, command line or page can show it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from pydantic_core import CoreSchema, core_schema

from discovery.errors import StoreError

PASSWORD_VARIABLE: Final = "PGPASSWORD"
"""Environment variable from which PostgreSQL's clients read a password."""
_FORM: Final = "postgresql://USER@HOST:PORT/DATABASE"
_HOST: Final = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d{1,5})?")
"""One of the hosts, such as those of a primary and its standby, with its port."""
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


class DatabaseUrl:
    """URL of a PostgreSQL database. Its text, and whatever is made of it by pydantic, has no password."""

    __slots__ = ("password", "text")

    def __init__(self, text: str, password: str | None = None) -> None:
        self.text = text
        self.password = password  # None: from the environment or the password file

    @property
    def database(self) -> str:
        """The name of the database."""
        return unquote(urlsplit(self.text).path[1:])

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"DatabaseUrl({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DatabaseUrl) and (self.text, self.password) == (other.text, other.password)

    def __hash__(self) -> int:
        return hash(self.text)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.is_instance_schema(cls, serialization=core_schema.to_string_ser_schema())


StorePlace = Path | DatabaseUrl
"""Where a store is."""


def parse_place(value: object, kind: str = "store") -> StorePlace:
    """Return the place that a text, a path or a place names. Raises StoreError, which never shows the text of a URL.

    `kind` says in the message what is at the place.
    """
    if isinstance(value, DatabaseUrl):
        return value
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        raise StoreError(f"a {kind} is named by a path or {_FORM}")
    if not (scheme := _SCHEME.match(text)):
        return Path(text)
    if scheme[1].lower() not in ("postgresql", "postgres"):
        raise StoreError(f"a {kind} cannot be opened by a URL that begins with {scheme[1]}:; use a path or {_FORM}")
    return _parse_url(text, kind)


def child_environment(*places: StorePlace | None, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process that gets the texts of places on its command line.

    Raises StoreError if their URLs have different passwords, because the environment has room for one.
    """
    given = dict(os.environ if environment is None else environment)
    urls = [place for place in places if isinstance(place, DatabaseUrl)]
    passwords = {url.password for url in urls if url.password is not None}
    if len(passwords) > 1:
        shown = " and ".join(dict.fromkeys(map(str, urls)))
        raise StoreError(f"{shown} have different passwords; leave them out and write them to the file ~/.pgpass")
    given.update((PASSWORD_VARIABLE, password) for password in passwords)
    return given


def _parse_url(text: str, kind: str) -> DatabaseUrl:
    """Return the URL without its password, and the password. Raises StoreError."""
    try:
        parts = urlsplit(text)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise StoreError(f"the {kind}'s URL cannot be parsed; {_hint()}") from None
    has_hosts = all(_HOST.fullmatch(host) for host in parts.netloc.rpartition("@")[2].split(","))
    if not has_hosts or not text.partition(":")[2].startswith("//") or "@" in parts.path + parts.query or "#" in text:
        raise StoreError(f"the {kind}'s URL cannot be parsed; {_hint()}")
    if "/" in parts.path[1:] or not parts.path[1:]:
        raise StoreError(f"the {kind}'s URL names no database; {_hint()}")
    if "sslpassword" in dict(query):
        raise StoreError(f"the {kind}'s URL holds sslpassword; use a key without a password; {_hint()}")
    user_info, at, hosts = parts.netloc.rpartition("@")
    user, colon, in_authority = user_info.partition(":")
    passwords = [value for name, value in query if name == "password"]
    if colon and in_authority:
        passwords.insert(0, unquote(in_authority))
    left = urlencode([(name, value) for name, value in query if name != "password"], safe="/:,")
    clean = f"postgresql://{user}{at}{hosts}{parts.path}"
    return DatabaseUrl(f"{clean}?{left}" if left else clean, passwords[0] if passwords else None)


def _hint() -> str:
    return f"write {_FORM}, and special characters of a user or password percent-encoded, such as %40 for @"
