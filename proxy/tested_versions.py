"""Tested versions of the libraries whose internals the proxy uses, and the check before each use.

The fast paths take over connections of aiohttp and extend uvicorn's HTTP protocol, both through private attributes.
With a version that was not tested, the callers use the library's public interface instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from types import MappingProxyType
from typing import Final

logger = logging.getLogger(__name__)

TESTED: Final[Mapping[str, str]] = MappingProxyType({"aiohttp": "3.14", "uvicorn": "0.54"})
"""Tested minor version of each library. pyproject.toml allows only these; a test compares the two."""
CONSEQUENCES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "aiohttp": "requests to upstreams are sent through its public session, which is slower",
        "uvicorn": "its own HTTP protocol is used, without this proxy's limits on connections, request heads and slow "
        "clients; put a reverse proxy in front that sets them",
    }
)
"""Consequence of a version that was not tested, for the log."""


@cache
def has_tested_internals(library: str) -> bool:
    """Return whether the installed version of `library` is a tested one. Warns once if it is not."""
    installed = version(library)
    is_tested = installed.startswith(f"{TESTED[library]}.")
    if not is_tested:
        logger.warning(
            "%s %s is installed but %s was tested: %s", library, installed, TESTED[library], CONSEQUENCES[library]
        )
    return is_tested
