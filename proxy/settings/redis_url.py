"""Type of settings that hold the URL of a Redis."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr


def _check_redis_url(url: SecretStr) -> SecretStr:
    """Raise ValueError unless `url` names a Redis. The message never quotes it: it may hold a password."""
    if not url.get_secret_value():
        return url
    try:
        parts = urlsplit(url.get_secret_value())
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("its host or port cannot be read; percent-encode / ? # @ : in the password") from None
    if parts.scheme not in ("redis", "rediss"):
        raise ValueError("it must begin with redis://, or rediss:// for TLS")
    if not host:
        raise ValueError("it names no host; write redis://:PASSWORD@HOST:6379/0")
    if not re.fullmatch(r"/?|/[0-9]{1,5}", parts.path, re.ASCII) or parts.query or parts.fragment:
        raise ValueError(
            "only the number of a database may follow the host, as in /0; percent-encode / ? # @ : in the password"
        )
    return url


RedisUrl = Annotated[SecretStr, AfterValidator(_check_redis_url)]
"""URL of a Redis. It is secret as a whole, because it may hold a password; empty means none."""
