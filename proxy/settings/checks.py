"""Checks of settings against each other and against files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from controllers.builtin import is_admin_only
from controllers.errors import ControllersError
from controllers.loading import parse_spec
from controllers.rollout_state import name_problem
from discovery.data.atomic_files import DATABASE_FILES, is_database_file
from discovery.errors import install_hint
from discovery.store.databases.places import DatabaseUrl
from proxy.errors import SettingsError
from proxy.settings.model import Settings
from proxy.settings.upstreams import parse_upstreams
from proxy.spill_paths import candidate_paths, is_foreign

REPLY_CONTROLLERS: Final = ("tools_controller", "json_controller", "select_controller", "reply_controller")
"""Settings of controllers for requests whose branches are whole replies of the upstream."""


def find_problems(settings: Settings) -> list[str]:
    """Run every check and return the problems, each of which begins with the name of the setting."""
    checks = (check_controller, check_upstream, check_extras, check_store, check_files, check_spill_file)
    return problems_of(*(partial(check, settings) for check in checks))


def problems_of(*checks: Callable[[], object]) -> list[str]:
    """Run checks that raise SettingsError and return all their problems."""
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except SettingsError as error:
            problems += error.problems
    return problems


def check_controller(settings: Settings) -> None:
    """Raise SettingsError unless the settings of controllers name controllers that clients may use."""
    for field in ("controller", *REPLY_CONTROLLERS):
        try:
            spec = parse_spec(getattr(settings, field))
        except ControllersError as error:
            raise SettingsError(f"{field}: {error}") from None
        if not spec.is_foreign and is_admin_only(spec.name):
            raise SettingsError(f"{field}: {spec.name} is for admins only; name another controller")
        if spec.is_foreign and (problem := name_problem(spec.name)):
            raise SettingsError(f"{field}: {problem}")
        if field in REPLY_CONTROLLERS and spec.needs_probes:
            raise SettingsError(f"{field}: {spec.name} probes, and such requests have no probes; name another one")


def check_upstream(settings: Settings) -> None:
    """Raise SettingsError if two kinds of credentials are set for the upstream."""
    if settings.upstream is None or settings.upstream_api_key is None:
        return
    if parse_upstreams(settings.upstream).has_credentials:
        raise SettingsError(
            "upstream: its URL holds a user or password, and upstream_api_key is set too; remove one of them"
        )


def check_extras(settings: Settings) -> None:
    """Raise SettingsError if shared limits or a database are set and their client is not installed."""
    if settings.limits and find_spec("redis") is None:
        raise SettingsError(f"limits: the package redis is not installed; {install_hint('redis')}")
    for name, place in (("store", settings.store), ("registry", settings.registry)):
        if isinstance(place, DatabaseUrl) and find_spec("asyncpg") is None:
            raise SettingsError(f"{name}: the package asyncpg is not installed; {install_hint('postgres')}")


def check_store(settings: Settings) -> None:
    """Raise SettingsError if `store` is an existing file of another kind, in which nothing can ever be recorded."""
    store = settings.store
    if not isinstance(store, Path):
        return
    try:
        is_other = store.is_dir() or (store.is_file() and os.access(store, os.R_OK) and store.stat().st_size > 0)
    except OSError:  # it may be readable later
        return
    if is_other and not is_database_file(store):
        raise SettingsError(f"store: {store} exists and is not a store; name a store, or a new file")


def check_files(settings: Settings) -> None:
    """Raise SettingsError if records could be kept nowhere, or if another setting names a file of the store.

    Closing such a file would drop the locks by which SQLite protects the store. Its folder may be missing, such as one
    that is mounted later, if the spill file has one.
    """
    store = settings.store
    if not isinstance(store, Path):
        return
    folder, spill = store.resolve().parent, settings.spill or store
    try:
        has_folder = folder.is_dir() or spill.resolve().parent.is_dir()
    except OSError as error:
        raise SettingsError(f"store: {error.filename}: {error.strerror}; name a file in a folder you can use") from None
    if not has_folder:
        raise SettingsError(f"store: {store}: there is no folder {folder}; create it, or set spill to a file elsewhere")
    for name, path in settings:
        if not isinstance(path, Path) or name == "store":
            continue
        paths = candidate_paths(path) if name == "spill" else [path]
        if any(_is_store_file(place, store) for place in paths):
            raise SettingsError(f"{name}: {path} is a file of the store; name another file")


def _is_store_file(path: Path, store: Path) -> bool:
    """Return whether a path is the store or its log, index or journal, also through a link."""
    store_files = [Path(f"{store.resolve()}{end}") for end in DATABASE_FILES]
    if path.resolve() in store_files:
        return True
    try:
        return any(path.exists() and file.exists() and path.samefile(file) for file in store_files)
    except OSError:  # what cannot be looked at cannot be opened either
        return False


def check_spill_file(settings: Settings) -> None:
    """Raise SettingsError if `spill` is an existing file of another kind, because spill files are overwritten."""
    if settings.spill is None or settings.store is None:
        return
    try:
        is_taken = is_foreign(settings.spill)
    except OSError as error:
        raise SettingsError(f"spill: {settings.spill}: {error.strerror}") from None
    if is_taken:
        raise SettingsError(f"spill: {settings.spill} exists and is not a spill file; name another path")
