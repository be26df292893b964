"""Settings of upstreams: one URL, several, a name that resolves to several, or a file that maps models to URLs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from pydantic import AnyHttpUrl, TypeAdapter, ValidationError

MAX_REPLICAS: Final = 256
"""Maximum number of replicas. Each has metrics of its own and is checked every few seconds."""
LONGEST_LABEL: Final = 63
"""Characters of a part of a host name (RFC 1035)."""
_BETWEEN_URLS: Final = re.compile(r"\s*,\s*(?=[A-Za-z][A-Za-z0-9+.-]*://)")
"""Commas between URLs. A comma within a password is not followed by a scheme."""
_AFTER_A_BLANK: Final = re.compile(r"\s[A-Za-z][A-Za-z0-9+.-]*://")
"""Second URL that no comma separates from the first."""
_URL: Final = TypeAdapter(AnyHttpUrl)
_DNS: Final = "dns+"
"""Beginning of a URL whose host is resolved to the addresses of the replicas."""
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_OWN_HEADERS: Final = frozenset(
    (
        *("accept", "accept-encoding", "authorization", "connection", "content-encoding", "content-length"),
        *("content-type", "cookie", "date", "expect", "host", "keep-alive", "te", "traceparent", "tracestate"),
        *("trailer", "transfer-encoding", "upgrade", "user-agent", "x-request-id"),
    )
)
"""Headers that HTTP or the proxy sets."""


class ReplicaAddress(NamedTuple):
    """Address of one replica, and its models."""

    url: str  # may hold a user and a password
    models: frozenset[str] | None = None  # models that requests are sent there for; None: all that it lists


class Upstreams(NamedTuple):
    """Upstreams that a setting names."""

    addresses: tuple[ReplicaAddress, ...]
    is_map: bool = False  # whether the setting is a file that maps models to URLs
    is_dns: bool = False  # whether the host of the only address is resolved to those of the replicas

    @property
    def is_single(self) -> bool:
        """Whether there is one upstream for all models."""
        return len(self.addresses) == 1 and not self.is_map and not self.is_dns

    @property
    def passwords(self) -> list[str]:
        """Passwords in the URLs."""
        return [password for address in self.addresses if (password := urlsplit(address.url).password)]

    @property
    def has_credentials(self) -> bool:
        """Whether a URL holds a user or a password."""
        return any("@" in urlsplit(address.url).netloc for address in self.addresses)


def check_upstream(text: str) -> str:
    """Return the setting with its URLs normalised. Raises ValueError."""
    upstreams = parse_upstreams(text)
    if upstreams.is_map:
        return text.strip()
    return _DNS * upstreams.is_dns + ",".join(address.url for address in upstreams.addresses)


def check_session_header(name: str) -> str:
    """Return the name of a header that may carry the id of a request. Raises ValueError."""
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError("it is no name of a header; use letters, digits and hyphens, as in x-session-id")
    if name.lower() in _OWN_HEADERS:
        raise ValueError("HTTP or the proxy sets this header itself; name another one, such as x-session-id")
    return name


def parse_upstreams(text: str) -> Upstreams:
    """Return the upstreams that a setting names, and read its file if it is one. Raises ValueError."""
    text = text.strip()
    if text.endswith(".toml") and "://" not in text:
        return Upstreams(tuple(_read_map(Path(text))), is_map=True)
    parts = _BETWEEN_URLS.split(text.rstrip(", "))
    if len(parts) == 1 and text.lower().startswith(_DNS):
        return Upstreams((ReplicaAddress(_dns_url(text[len(_DNS) :])),), is_dns=True)
    if len(parts) == 1:
        return Upstreams((ReplicaAddress(_url(parts[0])),))
    urls = []
    for number, part in enumerate(parts, 1):
        try:
            urls.append(_url(part))
        except ValueError as error:
            raise ValueError(f"URL {number} of {len(parts)}: {error}") from None
    _check_distinct(urls)
    return Upstreams(tuple(map(ReplicaAddress, urls)))


def _read_map(path: Path) -> Iterator[ReplicaAddress]:
    """Yield the addresses in a file that maps models to URLs. An address occurs once, with all of its models."""
    try:
        with path.open("rb") as opened:
            by_model = tomllib.load(opened)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a file of models, or a URL: http://HOST:PORT") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        advice = 'lines are "MODEL" = ["http://HOST:8000"], with names of models in quotes'
        raise ValueError(f"{path}: {error}; {advice}") from None
    if not by_model:
        raise ValueError(f'{path} names no model; add lines such as "MODEL" = ["http://HOST:8000"]')
    models: dict[str, set[str]] = {}
    for model, value in by_model.items():
        urls = _urls_of(path, model, value)
        for url in urls:
            models.setdefault(url, set()).add(model)
    _check_distinct(list(models), f"{path}: ")
    for url, served in models.items():
        yield ReplicaAddress(url, frozenset(served))


def _urls_of(path: Path, model: str, value: Any) -> list[str]:
    """Return the URLs of one model in a file. Raises ValueError, which names the model but shows no URL."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        hint = '; quote model names that contain a dot, as in "Qwen3-0.6B"' if isinstance(value, dict) else ""
        raise ValueError(f"{path}: model {model!r} needs a URL or a list of URLs{hint}")
    try:
        urls = [_url(text.strip()) for text in texts]
        _check_distinct(urls)
    except ValueError as error:
        raise ValueError(f"{path}: model {model!r}: {error}") from None
    return urls


def _dns_url(text: str) -> str:
    """Return the URL whose host is resolved. Raises ValueError."""
    url = _url(text)
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http":
        raise ValueError("use dns+http: a certificate would have to name the addresses; or name the URLs themselves")
    if _is_address(host):
        raise ValueError(f"{host} is an address; name a host after dns+http://, or leave dns+ out")
    if not all(0 < len(label) <= LONGEST_LABEL for label in host.removesuffix(".").split(".")):
        raise ValueError(f"{host} is not a host name: its parts must have 1 to {LONGEST_LABEL} characters")
    return url


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _url(text: str) -> str:
    """Return a URL in its normal form. Raises ValueError, without the URL, which may hold a password."""
    if text.lower().startswith(_DNS):
        raise ValueError("dns+http://NAME:PORT must be the only upstream; it stands for all addresses of the name")
    if _AFTER_A_BLANK.search(text):
        raise ValueError("separate several URLs by commas")
    try:
        url = _URL.validate_python(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"].replace("Input should be a valid URL", "it is no URL")
        raise ValueError(f"{problem}; write http://HOST:PORT or https://HOST") from None
    if "," in (url.host or ""):
        raise ValueError("separate URLs by commas, and begin each with http:// or https://")
    if url.query is not None or url.fragment is not None:
        raise ValueError("leave out what follows ? or #; it would not reach the upstream")
    return str(url)


def _check_distinct(urls: list[str], where: str = "") -> None:
    """Raise ValueError if there are too many URLs, or if two differ by no more than their credentials."""
    if len(urls) > MAX_REPLICAS:
        raise ValueError(f"{where}names {len(urls)} URLs; at most {MAX_REPLICAS} are supported")
    names = [urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2]).geturl() for url in urls]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"{where}{name} is named twice; name each replica once")
