"""Type of settings that hold a bearer token."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, SecretStr


def _check_bearer_token(token: SecretStr) -> SecretStr:
    """Return the token without white space at its ends, such as the line end of a file that a Secret was made of.

    Raises ValueError if it has a line end or another control character inside, which no client could send.
    """
    stripped = token.get_secret_value().strip()
    if not stripped.isprintable():
        raise ValueError("it has a line end or another control character inside, which no header can carry")
    return SecretStr(stripped)


BearerToken = Annotated[SecretStr, AfterValidator(_check_bearer_token)]
"""A bearer token; empty means none."""
