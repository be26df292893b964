"""The keys of clients: a file in which each has a name, the hash of what is sent, and what it may use; or a variable.

A line a key, in TOML (`FILE.toml`, or any other name) or as one object in JSON (`FILE.json`):

    alice = { sha256 = "9f86d0…", tokens_per_minute = 200000, episodes = 4 }

A key has 256 random bits, so its plain hash cannot be turned back, and no slow one is needed. `sha256` may be a list:
the old and the new key while clients change over. The tenant follows from the name, so that a new key keeps it.

A variable holds names and hashes alone, `alice=9f86d0…,bob=60303a…`, with commas or new lines between. It is read once.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Mapping
from hashlib import blake2b, sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from discovery.errors import unknown_field
from proxy.admission.token_budget import Caps, limit_below
from proxy.errors import SettingsError

logger = logging.getLogger(__name__)

KEY_PREFIX: Final = "sk-autotts-"
"""How keys begin: what scans repositories for secrets can tell them."""
NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_LINE: Final = re.compile(r"line (\d+)")

_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
KEYS_VARIABLE: Final = "AUTOTTS_CLIENT_KEYS"
SETTLE_S: Final = 0.5
"""Seconds for which a file must not have changed before keys that are missing from it count as removed."""

Hash = Annotated[str, Field(pattern=rf"^{_HASH.pattern}$")]
Some = Annotated[int, Field(ge=1, strict=True)]


def _as_list(given: object) -> object:
    return [given] if isinstance(given, str) else given


class _Entry(BaseModel):
    """What the file says of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[list[Hash], Field(min_length=1, max_length=8), BeforeValidator(_as_list)]
    admin: Annotated[bool, Field(strict=True)] = False
    branches: Some | None = None
    tokens: Some | None = None
    tokens_per_minute: Some | None = None
    episodes: Some | None = None


class _Seen(NamedTuple):
    """State of a file, by which a change is noticed."""

    modified_ns: int
    size: int
    inode: int


class Key(NamedTuple):
    """A key that is known."""

    name: str
    hashes: tuple[str, ...]  # SHA-256 in hex of what may be sent for it
    is_admin: bool
    caps: Caps

    @property
    def tenant(self) -> str:
        """Whose requests it makes: the same for every key that ever has the name."""
        return blake2b(self.name.encode(), digest_size=12, person=b"autotts key").hexdigest()


def hash_key(token: str) -> str:
    """What a file holds in place of a key."""
    return sha256(token.encode()).hexdigest()


def generate_key() -> str:
    """A key nobody has."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_file_entry(name: str, token: str, *, admin: bool = False) -> str:
    """What to put into the file for a key. Raises SettingsError."""
    if not NAME.fullmatch(name):
        raise SettingsError(f"keys: {name!r} is no name; letters, digits, - and _ make one, 64 at most")
    return f'{name} = {{ sha256 = "{hash_key(token)}"{", admin = true" if admin else ""} }}'


def read_key_file(path: Path) -> tuple[Key, ...]:
    """Return the keys of a file, at least one. Raises SettingsError naming file and line."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise SettingsError(f"keys: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"keys: {path}: is no UTF-8") from None
    seen: dict[str, str] = {}
    found = []
    for name, said in _parse(path, text).items():
        key = _key(path, text, name, said)
        for one in key.hashes:
            if one in seen:
                raise _wrong(path, text, name, f"has the key of {seen[one]}")
            seen[one] = name
        found.append(key)
    if not found:
        raise SettingsError(f"keys: {path}: there is no key in it; add a line that `autotts keys new NAME` writes")
    return tuple(found)


def parse_key_list(text: str) -> tuple[Key, ...]:
    """The keys of a variable. Raises SettingsError, saying nothing of what it holds: it may be a key itself."""
    hashes: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for number, one in enumerate(filter(str.strip, re.split(r"[,\n]", text)), 1):
        name, _, digest = map(str.strip, one.partition("="))
        if not NAME.fullmatch(name) or not _HASH.fullmatch(digest):
            raise SettingsError(
                f"{KEYS_VARIABLE}: entry {number}: say NAME=HASH, the sha256 that `autotts keys new` writes"
            )
        if digest in seen:
            raise SettingsError(f"{KEYS_VARIABLE}: entry {number}: has the key of another")
        seen.add(digest)
        hashes[name] = (*hashes.get(name, ()), digest)
    return tuple(Key(name, digests, False, Caps()) for name, digests in hashes.items())


def load_keyring(path: Path | None, told: SecretStr | None, need: int = 0) -> Keyring | None:
    """The keys of a file and a variable, None if there is neither. Raises SettingsError.

    A key with a limit below `need`, the tokens of one interval and its answer, is warned of.
    """
    if path is None and told is None:
        return None
    return Keyring(path, () if told is None else parse_key_list(told.get_secret_value()), need)


def too_small_warning(need: int) -> str:
    """The end of a warning about a limit."""
    return f"is less than the {need} or so that one interval and its answer need; with β only short replies are served"


def _parse(path: Path, text: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"keys: {path}, line {error.lineno}: {error.msg}") from None
    except tomllib.TOMLDecodeError as error:
        where = _LINE.search(str(error))
        at = where[1] if where else str(text.count("\n") + 1)
        raise SettingsError(f"keys: {path}, line {at}: is no TOML") from None
    except RecursionError:
        raise SettingsError(f"keys: {path}: is nested too deeply") from None
    if not isinstance(parsed, dict):
        raise SettingsError(f"keys: {path}: must be an object, a name for each key")
    return parsed


def _key(path: Path, text: str, name: str, said: object) -> Key:
    if not NAME.fullmatch(name):
        raise _wrong(path, text, name, "is no name; letters, digits, - and _ make one, 64 at most")
    try:
        entry = _Entry.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "entry"
        is_unknown = first["type"] == "extra_forbidden"
        problem = (
            unknown_field(where, _Entry.model_fields) if is_unknown else first["msg"].removeprefix("Value error, ")
        )
        raise _wrong(path, text, name, f"{where}: {problem}") from None
    caps = Caps(entry.branches, entry.tokens, entry.tokens_per_minute, entry.episodes)
    return Key(name, tuple(entry.sha256), entry.admin, caps)


def _wrong(path: Path, text: str, name: str, words: str) -> SettingsError:
    """What is wrong with an entry, and where it begins. Never what it holds: somebody may have put the key there."""
    begins = re.compile(rf"""^[\s\[{{,]*["']?{re.escape(name)}["']?\s*[\]:=.]""")
    at = next((number for number, one in enumerate(text.splitlines(), 1) if begins.match(one)), 1)
    return SettingsError(f"keys: {path}, line {at}: {name}: {words}")


class Keyring:
    """The keys of a file as it is now, and `fixed` ones.

    A file that cannot be used leaves the keys as they were, and is logged once. So does a file that is being written in
    place: keys that are missing from it count as removed once it has not changed for SETTLE_S seconds.
    """

    def __init__(self, path: Path | None, fixed: tuple[Key, ...] = (), need: int = 0) -> None:
        self._path = path
        self._need = need
        self._fixed = fixed
        self._seen = self._look()
        self._keys = self._read()
        self._is_broken = False

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys, read anew if the file has changed."""
        seen = self._look()
        if seen == self._seen:
            return self._keys
        try:
            keys = self._read()
        except SettingsError as error:
            self._seen, self._is_broken = seen, True
            logger.error("%s; the keys stay as they were", error)
            return self._keys
        if self._look() != seen or self._may_be_partial(seen, keys):
            return self._keys  # and the file is looked at again for the next request
        self._seen, self._keys, self._is_broken = seen, keys, False
        logger.info("keys: %s has changed: %d keys", self._path, len(self._keys))
        return self._keys

    @property
    def is_broken(self) -> bool:
        """Whether the file as it is now cannot be used, so that older keys count."""
        return self.keys is not None and self._is_broken

    def _may_be_partial(self, seen: _Seen | None, keys: tuple[Key, ...]) -> bool:
        """Whether `keys` lack one that counts now, in a file that is being written in place."""
        if seen is None or self._seen is None or seen.inode != self._seen.inode:
            return False
        kept = {one for key in keys for one in key.hashes}
        is_fresh = 0 <= time.time_ns() - seen.modified_ns < SETTLE_S * 1e9
        return is_fresh and any(one not in kept for key in self._keys for one in key.hashes)

    def find(self, token: str) -> Key | None:
        """The key that `token` is. How long it takes does not tell which, or how nearly."""
        given = hash_key(token)
        found = None
        for key in self.keys:
            for one in key.hashes:
                if compare_digest(one, given):
                    found = key
        return found

    def _read(self) -> tuple[Key, ...]:
        """All keys. Raises SettingsError, also if a fixed one is in the file too: which of them counts nobody said."""
        filed = () if self._path is None else read_key_file(self._path)
        names, hashes = {key.name for key in self._fixed}, {one for key in self._fixed for one in key.hashes}
        for key in filed:
            if key.name in names or not hashes.isdisjoint(key.hashes):
                raise SettingsError(f"keys: {self._path}: {key.name} is in {KEYS_VARIABLE} too")
        for key in filed:
            if limit := limit_below(key.caps, self._need):
                logger.warning("keys: %s: %s: %s %s", self._path, key.name, limit, too_small_warning(self._need))
        return (*filed, *self._fixed)

    def _look(self) -> _Seen | None:
        """Return what changes with the file, or None if there is no file."""
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return _Seen(stat.st_mtime_ns, stat.st_size, stat.st_ino)
