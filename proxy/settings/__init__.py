"""Settings of the proxy: their definitions, sources and checks.

Imported by every folder of the proxy above it. Imports spill paths, probe templates and errors.
"""

from proxy.settings.model import LogForm, Settings, StoreText, is_secret
from proxy.settings.sources import (
    DEFAULT,
    EMBEDDED,
    EMBEDDED_DEFAULT,
    PREFIX,
    SERVED,
    Configured,
    configure,
    find_file,
    load,
)

__all__ = [
    "DEFAULT",
    "EMBEDDED",
    "EMBEDDED_DEFAULT",
    "PREFIX",
    "SERVED",
    "Configured",
    "LogForm",
    "Settings",
    "StoreText",
    "configure",
    "find_file",
    "is_secret",
    "load",
]
