"""API keys of clients, from a key file or from the variable AUTOTTS_CLIENT_KEYS.

A key file holds one entry per key, in TOML (`FILE.toml` or any other name) or as one JSON object (`FILE.json`):

    alice = { sha256 = "9f86d0…", tokens_per_minute = 200000, episodes = 4 }

A key has 256 random bits, so a plain SHA-256 cannot be reversed and no slow hash is needed. `sha256` may be a list of
the old and the new key while clients change over. The tenant follows from the name, so a new key keeps the tenant.

The variable holds only names and hashes, `alice=9f86d0…,bob=60303a…`, separated by commas or newlines. It is read once.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Iterable, Mapping
from hashlib import blake2b, sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from discovery.errors import problem_text, unknown_field
from proxy.admission.token_budget import Caps, limit_below
from proxy.errors import SettingsError

logger = logging.getLogger(__name__)

KEY_PREFIX: Final = "sk-autotts-"
"""Prefix of every key, so that secret scanners recognise it."""
NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_NAME_ADVICE: Final = "use 1 to 64 letters, digits, - and _"
_TOML: Final = 'invalid TOML; lines are NAME = { sha256 = "HASH" }, as `autotts keys new` prints them'
_ADVICE: Final = {
    "missing": "it is missing; `autotts keys new` prints it",
    "model_type": 'write NAME = { sha256 = "HASH" }, as `autotts keys new` prints it',
    "string_pattern_mismatch": "it must be the 64 hexadecimal digits that `autotts keys new` prints",
    "int_type": "it must be a whole number, without quotes",
    "bool_type": "it must be true or false, without quotes",
}
"""Requirements of the fields of a key, by the type of pydantic's error."""
_SHOWN_CHARS: Final = 8
_LINE: Final = re.compile(r"line (\d+)")

_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
KEYS_VARIABLE: Final = "AUTOTTS_CLIENT_KEYS"
SETTLE_S: Final = 0.5
"""Seconds for which a file must be unchanged before keys missing from it count as removed."""

Hash = Annotated[str, Field(pattern=rf"^{_HASH.pattern}$")]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _KeyEntry(BaseModel):
    """The entry of one key in the key file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[list[Hash], Field(min_length=1, max_length=8), BeforeValidator(_as_list)]
    admin: Annotated[bool, Field(strict=True)] = False
    priority: Annotated[bool, Field(strict=True)] = False
    beta: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    branches: PositiveInt | None = None
    tokens: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    episodes: PositiveInt | None = None


class _FileVersion(NamedTuple):
    """Metadata of a file that differ between its versions."""

    modified_ns: int
    size: int
    inode: int


class Key(NamedTuple):
    """A configured API key."""

    name: str
    hashes: tuple[str, ...]  # SHA-256 in hex of each token that is accepted for it
    is_admin: bool
    caps: Caps
    has_priority: bool = False  # it may set `priority` and the headers of inference gateways
    beta: float | None = None  # of requests that set none

    @property
    def tenant(self) -> str:
        """Hash of the name. It stays the same when the key is replaced."""
        return blake2b(self.name.encode(), digest_size=12, person=b"autotts key").hexdigest()


def hash_key(token: str) -> str:
    """Return the hash that a key file holds instead of the key."""
    return sha256(token.encode()).hexdigest()


def generate_key() -> str:
    """Return a new random key."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_file_entry(name: str, token: str, *, admin: bool = False) -> str:
    """Return the line for a key in a TOML key file. Raises SettingsError for an invalid name."""
    if not NAME.fullmatch(name):
        raise SettingsError(f"keys: invalid name {name!r}; {_NAME_ADVICE}")
    return f'{name} = {{ sha256 = "{hash_key(token)}"{", admin = true" if admin else ""} }}'


def anonymous_tenant(token: str) -> str:
    """Return the tenant of a token without a name: the admin key, or any if no keys are configured."""
    return blake2b(token.encode(), digest_size=12).hexdigest() if token else ""


def tenant_names(keys: Iterable[Key], tenants: Iterable[str], admin_key: str | None = None) -> dict[str, str]:
    """Return the name of each tenant's key; the beginning of its hash if it has none any more.

    `admin_key` is the server's admin key, if it has one and it is known.
    """
    names = {anonymous_tenant(admin_key): "admin key"} if admin_key else {}
    names |= {key.tenant: key.name for key in keys}
    return {tenant: names.get(tenant, f"#{tenant[:_SHOWN_CHARS]}" if tenant else "no key") for tenant in tenants}


def read_key_file(path: Path) -> tuple[Key, ...]:
    """Return the keys of a file, at least one. Raises SettingsError naming file and line."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        advice = ""
        if isinstance(error, FileNotFoundError):
            advice = f"; set AUTOTTS_KEYS to your key file, or write it: `autotts keys new NAME >> {path}`"
        elif isinstance(error, PermissionError):
            advice = "; let the proxy's user read it"
        raise SettingsError(f"keys: {path}: {error.strerror}{advice}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"keys: {path}: not UTF-8") from None
    owners: dict[str, str] = {}  # name of a key by its hash
    keys = []
    for name, entry in _parse(path, text).items():
        key = _parse_entry(path, text, name, entry)
        for digest in key.hashes:
            if digest in owners:
                raise _entry_error(path, text, name, f"same key as {owners[digest]}")
            owners[digest] = name
        keys.append(key)
    if not keys:
        raise SettingsError(f"keys: {path}: no keys; add a line that `autotts keys new NAME` prints")
    return tuple(keys)


def parse_key_list(text: str) -> tuple[Key, ...]:
    """Return the keys of the variable. Raises SettingsError, which never quotes the text: it may hold a real key."""
    hashes: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for number, entry in enumerate(filter(str.strip, re.split(r"[,\n]", text)), 1):
        name, _, digest = map(str.strip, entry.partition("="))
        if not NAME.fullmatch(name) or not _HASH.fullmatch(digest):
            raise SettingsError(
                f"{KEYS_VARIABLE}: entry {number}: expected NAME=HASH, with the sha256 that `autotts keys new` prints"
            )
        if digest in seen:
            raise SettingsError(f"{KEYS_VARIABLE}: entry {number}: same key as an earlier entry")
        seen.add(digest)
        hashes[name] = (*hashes.get(name, ()), digest)
    return tuple(Key(name, digests, False, Caps()) for name, digests in hashes.items())


def load_keyring(path: Path | None, key_list: SecretStr | None, needed: int = 0, processes: int = 1) -> Keyring | None:
    """Return the keys of a file and of the variable, or None if neither is set. Raises SettingsError.

    Logs a warning for a key whose limit in each of `processes` is below `needed`, the tokens of one interval and its
    answer.
    """
    if path is None and key_list is None:
        return None
    return Keyring(path, () if key_list is None else parse_key_list(key_list.get_secret_value()), needed, processes)


def too_small_warning(needed: int) -> str:
    """Return the end of a warning about a limit that is less than `needed` tokens."""
    return (
        f"is less than the approximately {needed} tokens that one interval and its answer need; "
        "with β, only short replies can be served"
    )


def _parse(path: Path, text: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"keys: {path}, line {error.lineno}: {error.msg}") from None
    except tomllib.TOMLDecodeError as error:
        where = _LINE.search(str(error))
        line = where[1] if where else str(text.count("\n") + 1)
        is_repeated = str(error).startswith(("Cannot overwrite", "Cannot declare"))
        problem = _TOML
        if is_repeated:
            name = _name_on(text, int(line)) or "a name"
            problem = f"{name} occurs twice; for an old and a new key write sha256 = [OLD, NEW]"
        raise SettingsError(f"keys: {path}, line {line}: {problem}") from None
    except RecursionError:
        raise SettingsError(f"keys: {path}: nested too deeply") from None
    if not isinstance(parsed, dict):
        raise SettingsError(f"keys: {path}: must be a JSON object with one member per key")
    return parsed


def _parse_entry(path: Path, text: str, name: str, value: object) -> Key:
    if not NAME.fullmatch(name):
        raise _entry_error(path, text, name, f"invalid name; {_NAME_ADVICE}")
    try:
        entry = _KeyEntry.model_validate(value)
    except ValidationError as error:
        raise _entry_error(path, text, name, "; ".join(dict.fromkeys(map(_field_problem, error.errors())))) from None
    caps = Caps(entry.branches, entry.tokens, entry.tokens_per_minute, entry.episodes)
    return Key(name, tuple(entry.sha256), entry.admin, caps, entry.priority, entry.beta)


def _field_problem(details: ErrorDetails) -> str:
    """Return the problem of a field. Only a number is quoted, because texts may be a real key."""
    field = str(details["loc"][0]) if details["loc"] else "entry"
    if details["type"] == "extra_forbidden":
        return f"{field}: {unknown_field(field, _KeyEntry.model_fields)}"
    value = details["input"]
    shown = f", not {json.dumps(value)}" if isinstance(value, int | float) else ""
    return f"{field}: {_ADVICE.get(details['type']) or problem_text(details)}{shown}"


def _name_on(text: str, number: int) -> str | None:
    """Return the name of the key on a line; None if none begins there, so that nothing else is quoted."""
    name = text.splitlines()[number - 1].partition("=")[0].strip().strip("[]\"' ")
    return name if NAME.fullmatch(name) else None


def _entry_error(path: Path, text: str, name: str, problem: str) -> SettingsError:
    """Return an error with the line on which an entry begins. It never quotes the entry, which may hold a real key."""
    begin = re.compile(rf"""^[\s\[{{,]*["']?{re.escape(name)}["']?\s*[\]:=.]""")
    line = next((number for number, line in enumerate(text.splitlines(), 1) if begin.match(line)), 1)
    return SettingsError(f"keys: {path}, line {line}: {name}: {problem}")


class Keyring:
    """The keys of a file, which is reread when it changes, and the `fixed` keys of the variable.

    If the file becomes invalid, the previous keys stay valid and the error is logged once. A file that is being written
    in place may be incomplete: keys missing from it count as removed once it is unchanged for SETTLE_S seconds.
    """

    def __init__(self, path: Path | None, fixed: tuple[Key, ...] = (), needed: int = 0, processes: int = 1) -> None:
        self._path = path
        self._needed = needed
        self._processes = processes  # over which limits are divided
        self._fixed = fixed
        self._version = self._stat()
        self._keys = self._read()
        self._is_broken = False

    @property
    def keys(self) -> tuple[Key, ...]:
        """The current keys. Rereads the file if it has changed."""
        self._refresh()
        return self._keys

    @property
    def is_broken(self) -> bool:
        """Whether the file is invalid now, so that the previous keys are in use."""
        self._refresh()
        return self._is_broken

    def _refresh(self) -> None:
        """Reread the file if it has changed."""
        version = self._stat()
        if version == self._version:
            return
        try:
            keys = self._read()
        except SettingsError as error:
            self._version, self._is_broken = version, True
            logger.error("%s; keeping the previous keys", error)
            return
        if self._stat() != version or self._may_be_partial(version, keys):
            return  # the next request checks the file again
        self._version, self._keys, self._is_broken = version, keys, False
        logger.info("keys: reloaded %s: %d keys", self._path, len(self._keys))

    def _may_be_partial(self, version: _FileVersion | None, keys: tuple[Key, ...]) -> bool:
        """Return whether `keys` lack a current key because the file is still being written in place."""
        if version is None or self._version is None or version.inode != self._version.inode:
            return False
        kept = {digest for key in keys for digest in key.hashes}
        is_fresh = 0 <= time.time_ns() - version.modified_ns < SETTLE_S * 1e9
        return is_fresh and any(digest not in kept for key in self._keys for digest in key.hashes)

    def find(self, token: str) -> Key | None:
        """Return the key that `token` belongs to, or None. The time it takes does not reveal a match."""
        return self.find_hash(hash_key(token))

    def find_hash(self, token_hash: str) -> Key | None:
        """Return the key of the token with this hash, or None."""
        match = None
        for key in self.keys:
            for digest in key.hashes:
                if compare_digest(digest, token_hash):
                    match = key
        return match

    def _read(self) -> tuple[Key, ...]:
        """Return all keys. Raises SettingsError, also if a fixed key is in the file as well."""
        in_file = () if self._path is None else read_key_file(self._path)
        names, hashes = {key.name for key in self._fixed}, {digest for key in self._fixed for digest in key.hashes}
        for key in in_file:
            if key.name in names or not hashes.isdisjoint(key.hashes):
                raise SettingsError(f"keys: {self._path}: {key.name} is also in {KEYS_VARIABLE}; remove one of them")
        for key in in_file:
            if limit := limit_below(key.caps.share(self._processes), self._needed, self._processes):
                logger.warning("keys: %s: %s: %s %s", self._path, key.name, limit, too_small_warning(self._needed))
        return (*in_file, *self._fixed)

    def _stat(self) -> _FileVersion | None:
        """Return the file's version, or None if there is no file."""
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return _FileVersion(stat.st_mtime_ns, stat.st_size, stat.st_ino)
