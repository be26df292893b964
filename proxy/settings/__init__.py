"""Settings of the proxy: their definitions, sources and checks.

Imported by every folder of the proxy above it. Imports spill paths, probe templates and errors.
"""

from proxy.settings.checks import problems_of
from proxy.settings.model import AwayPolicy, LogForm, Settings, StoreText, is_secret
from proxy.settings.sources import (
    DEFAULT,
    EMBEDDED,
    EMBEDDED_DEFAULT,
    PREFIX,
    SERVED,
    Configured,
    configure,
    export_places,
    find_file,
    find_secret,
    inspect,
    load,
    unknown_variables,
)
from proxy.settings.upstreams import MAX_REPLICAS, ReplicaAddress, Upstreams, parse_upstreams

__all__ = [
    "DEFAULT",
    "EMBEDDED",
    "EMBEDDED_DEFAULT",
    "MAX_REPLICAS",
    "PREFIX",
    "SERVED",
    "AwayPolicy",
    "Configured",
    "LogForm",
    "ReplicaAddress",
    "Settings",
    "StoreText",
    "Upstreams",
    "configure",
    "export_places",
    "find_file",
    "find_secret",
    "inspect",
    "is_secret",
    "load",
    "parse_upstreams",
    "problems_of",
    "unknown_variables",
]
