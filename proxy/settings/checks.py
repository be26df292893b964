"""Checks of settings against each other and against files."""

from __future__ import annotations

from pathlib import Path

from controllers.builtin import is_admin_only
from controllers.errors import ControllersError
from controllers.loading import parse_spec
from controllers.rollout_state import name_problem
from discovery.data.atomic_files import DATABASE_FILES
from proxy.errors import SettingsError
from proxy.settings.model import Settings
from proxy.spill_paths import candidate_paths, is_foreign


def check_controller(settings: Settings) -> None:
    """Raise SettingsError unless `controller` names a controller that clients may use."""
    try:
        spec = parse_spec(settings.controller)
    except ControllersError as error:
        raise SettingsError(f"controller: {error}") from None
    if not spec.is_foreign and is_admin_only(spec.name):
        raise SettingsError(f"controller: {spec.name} is for admins only; name another controller")
    if spec.is_foreign and (problem := name_problem(spec.name)):
        raise SettingsError(f"controller: {problem}")


def check_upstream(settings: Settings) -> None:
    """Raise SettingsError if two kinds of credentials are set for the upstream."""
    has_user = settings.upstream is not None and (settings.upstream.username or settings.upstream.password)
    if has_user and settings.upstream_api_key is not None:
        raise SettingsError(
            "upstream: its URL holds a user or password, and upstream_api_key is set too; remove one of them"
        )


def check_files(settings: Settings) -> None:
    """Raise SettingsError if another setting names a file of the store.

    Closing such a file would drop the locks by which SQLite protects the store.
    """
    if settings.store is None:
        return
    for name, path in settings:
        if not isinstance(path, Path) or name == "store":
            continue
        paths = candidate_paths(path) if name == "spill" else [path]
        if any(_is_store_file(place, settings.store) for place in paths):
            raise SettingsError(f"{name}: {path} is a file of the store; name another file")


def _is_store_file(path: Path, store: Path) -> bool:
    """Return whether a path is the store or its log, index or journal, also through a link."""
    store_files = [Path(f"{store.resolve()}{end}") for end in DATABASE_FILES]
    return path.resolve() in store_files or any(
        path.exists() and file.exists() and path.samefile(file) for file in store_files
    )


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
