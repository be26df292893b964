"""Every setting of the proxy, with its unit. Read once: flags, then `AUTOTTS_*` variables, a file, these defaults."""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, get_args

from pydantic import AfterValidator, AnyHttpUrl, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from controllers.builtin import is_admin_only
from controllers.errors import ControllersError
from controllers.loading import parse_spec
from controllers.rollout_state import name_problem
from discovery.data.atomic_files import DATABASE_FILES
from proxy.errors import SettingsError
from proxy.probe_templates import Family
from proxy.spill_paths import is_foreign, places

Beta = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]


def _rising(text: str) -> str:
    low, _, high = text.partition(":")
    if float(low) > float(high):
        raise ValueError("the mark from which β shrinks comes first")
    return text


Marks = Annotated[str, Field(pattern=r"^\d{1,9}(\.\d{1,9})?:\d{1,9}(\.\d{1,9})?$"), AfterValidator(_rising)]


_PROXYS_FLAGS: Final = ("--host", "--port", "--outlive-parent")


def _vllm_flags(text: str) -> str:
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the flags cannot be read: {error}") from None
    for flag in flags:
        if flag.partition("=")[0] in _PROXYS_FLAGS:
            raise ValueError(f"the proxy itself sets {flag.partition('=')[0]}; leave it out")
    return text


class StoreText(StrEnum):
    """What of a request's text is written down."""

    NONE = "none"  # hashes of questions and answers, answers by number
    HASH = "hash"  # answers as they are written; questions by their hash
    FULL = "full"  # questions too


class LogForm(StrEnum):
    """How log lines are written."""

    PLAIN = "plain"  # for people
    JSON = "json"  # an object a line, and one for each request


class Settings(BaseSettings):
    """Frozen; one object is made at start and handed down."""

    model_config = SettingsConfigDict(env_prefix="AUTOTTS_", env_ignore_empty=True, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8400, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    log: LogForm = Field(LogForm.PLAIN, description="form of log lines: `plain`, or `json`, an object a line")

    upstream: AnyHttpUrl | None = Field(
        None,
        description="vLLM's base URL; none starts the embedded model. User and password in it are told to nobody",
    )
    upstream_api_key: SecretStr | None = Field(None, description="bearer token sent to the upstream")
    embedded_args: Annotated[str, AfterValidator(_vllm_flags)] | None = Field(
        None, description="further flags of `vllm serve` for the embedded model, as in a shell; unused with an upstream"
    )
    model: str | None = Field(None, description="model for requests that name none; none takes the upstream's first")

    model_aliases: bool = Field(True, description="list each model also as NAME@0.25, @0.5, @0.75 and @1, which set β")

    controller: str = Field("cmc", description="controller that serves requests which name none: a name or FILE.py")
    beta: Beta | None = Field(None, description="β for requests that set none; none passes them through untouched")
    required: bool = Field(
        False,
        description="refuse requests that set β and that no controller can serve, rather than pass them through; "
        "`tts.required` of a request wins",
    )
    calibration: Path | None = Field(
        None, description="file of what β costs and brings by model, as `autotts calibrate` writes it"
    )
    max_branches: int = Field(64, ge=1, description="branches one request may open")
    max_total_tokens: Tokens | None = Field(None, description="tokens one request may spend over all branches")
    deadline_s: Seconds | None = Field(None, description="seconds one request may think")

    decision_s: Seconds = Field(0.25, description="seconds a sealed controller may decide before it is killed")
    sandbox_pool: int = Field(8, ge=0, le=256, description="sealed processes kept ready for a controller from a file")
    allow_unsandboxed: bool = Field(
        False, description="run controllers from files with all of the proxy's rights, its keys included"
    )

    registry: Path | None = Field(None, description="folder of installed controllers; none serves the configured one")
    registry_poll_s: float = Field(
        1, ge=0, allow_inf_nan=False, description="seconds between looks at whether the registry has changed"
    )

    admin_key: SecretStr | None = Field(
        None, description="bearer token of those who may see every request and record without an answer; none: nobody"
    )

    keys: Path | None = Field(
        None, description="file of clients' keys, as `autotts keys new` writes its lines; none serves whoever asks"
    )
    client_keys: SecretStr | None = Field(
        None, description="clients' keys beside the file's, as NAME=HASH with commas or new lines between, read once"
    )
    allow_anonymous: bool = Field(False, description="listen on other addresses than loopback without a file of keys")
    allowed_hosts: str | None = Field(
        None,
        pattern=r"^\s*(\*|(\*\.)?[A-Za-z0-9._-]+)(\s*,\s*(\*|(\*\.)?[A-Za-z0-9._-]+))*\s*$",
        description="host names, besides localhost and addresses, that a proxy without keys is asked under, with "
        "commas between: `tts.example.org,*.internal`; `*` is any",
    )
    allowed_origins: str | None = Field(
        None,
        pattern=r"^\s*(\*|[a-z][a-z0-9+.-]*://[^\s,/]+)(\s*,\s*(\*|[a-z][a-z0-9+.-]*://[^\s,/]+))*\s*$",
        description="origins of web pages that may use the proxy from a browser, with commas between: "
        "`https://app.example.org`; `*` is any; none sends no CORS headers",
    )
    cache_secret: SecretStr | None = Field(
        None,
        description="what keeps tenants apart in the upstream's prefix cache; the same for all replicas; "
        "none draws one",
    )

    tokens_per_minute: Tokens | None = Field(None, description="tokens all requests together may spend in a minute")
    max_episodes: int = Field(256, ge=1, description="requests controllers serve at once; others wait")
    max_passed: int = Field(1024, ge=1, description="requests handed on untouched at once; others wait")
    branches_in_flight: int = Field(
        1024,
        ge=1,
        description="branches of all requests that generate at once; others wait. vLLM itself runs 256 to 1024, as its "
        "`--max-num-seqs` says",
    )
    queue: int = Field(1024, ge=0, description="requests that may wait of either; what comes then is refused")

    feedback_per_minute: int = Field(
        1200,
        ge=1,
        description="feedback one key may give in a minute, callers without a key all together; what comes then is "
        "refused with status 429",
    )

    load_waiting: Marks | None = Field(
        None, description="requests waiting at the upstream from which β shrinks, and at which no further: `4:32`"
    )
    load_cache: Marks | None = Field(
        None, description="share of its KV cache in use from which β shrinks, and at which no further: `0.8:0.95`"
    )
    load_factor: Beta = Field(0.25, description="what is left of β at the further mark of the two")

    record: bool = Field(True, description="record requests in the store")
    store: Path | None = Field(None, description="replay store that requests are recorded in; none records nothing")
    store_text: StoreText = Field(
        StoreText.NONE,
        description="what of questions and answers is stored: `none` (hashes), `hash` (answers, and questions by their "
        "hash), `full`",
    )
    retain_days: Annotated[float, Field(gt=0, le=36500, allow_inf_nan=False)] | None = Field(
        None,
        description="days after which a request is forgotten with all that came of it, 36500 at most; none keeps it",
    )
    recorder_queue: int = Field(10_000, ge=1, description="records that may wait in memory; what comes then is lost")
    spill: Path | None = Field(
        None,
        description="file that records go to while the store cannot be written, for nothing else; none puts it beside "
        "the store",
    )
    spill_bytes: int = Field(256 * 2**20, ge=0, description="size that file may grow to")
    record_fraction: float = Field(
        0.02,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of requests whose branches are run to their ends after the answer, to be replayed",
    )
    record_branches: int = Field(
        16, ge=0, le=1024, description="branches such a recording is filled up to, however few its controller opened"
    )
    record_at_once: int = Field(4, ge=1, le=1024, description="such branches that run at a time")
    record_tokens_per_hour: Tokens = Field(1_000_000, description="tokens that may be spent on them in an hour")

    interval: Tokens = Field(512, description="tokens of one interval, Δ")
    branch_temperature: float | None = Field(
        None,
        gt=0,
        le=2,
        description="temperature of all branches but the first when the request asks for 0; the first is greedy; none "
        "uses the model's own default",
    )
    probe_family: Family = Field(Family.AUTO, description="family of models by whose template probes are asked")
    probe_close: str | None = Field(None, description="text that ends a thought, instead of the family's")
    probe_lead: str | None = Field(
        None, pattern=r"\{$", description="text that leads into the answer, instead of the family's; ends with a brace"
    )
    probe_tokens: Tokens = Field(20, description="tokens a probe may generate")
    finalise_tokens: Tokens = Field(512, description="tokens for closing an unfinished branch into a reply")

    connect_timeout_s: Seconds = Field(5, description="seconds to connect to the upstream")
    read_timeout_s: Seconds = Field(600, description="seconds the upstream may be silent")
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="size of a request body")
    max_sent_bytes: int = Field(
        2 * 2**30,
        ge=1024,
        description="bytes one request may send upstream over all its branches, whose texts go along with each "
        "interval; then it is answered with what there is",
    )
    max_bodies_bytes: int = Field(
        512 * 2**20,
        ge=2**20,
        description="bytes of request bodies above 64 KiB held at the same time, of which one key may use half; what "
        "comes beyond is refused",
    )
    head_s: Seconds = Field(10, description="seconds the head of a request may take to arrive")
    body_s: Seconds = Field(300, description="seconds the body of a request may take to arrive")
    body_rate: int = Field(
        1024,
        ge=0,
        description="bytes a second at which a body must arrive on average, after its first 20 s; 0 sets no rate",
    )
    write_s: Seconds = Field(
        60, description="seconds a client may leave its answer unread before the connection is cut"
    )
    keep_alive_s: Seconds = Field(75, description="seconds an idle connection is kept open for the next request")
    max_connections: int = Field(
        8192,
        ge=1,
        description="open connections of clients; beyond that the one that has been idle, or sending its request, the "
        "longest is closed",
    )
    max_connections_per_address: int = Field(
        4096, ge=1, description="open connections of one client address, an IPv6 /64 network being one; likewise"
    )
    drain_s: float = Field(
        60, ge=0, allow_inf_nan=False, description="seconds requests under way have to end after SIGTERM"
    )
    ping_s: float = Field(
        10, gt=0, le=15, description="seconds between keep-alive comments on a stream that is thinking; 15 at most"
    )

    @property
    def embedded_flags(self) -> tuple[str, ...]:
        """`embedded_args`, one by one."""
        return tuple(shlex.split(self.embedded_args or ""))


EMBEDDED = {"interval": 32, "finalise_tokens": 48, "probe_tokens": 8, "controller": "parallel_probe"}
"""Defaults that suit the embedded model, whose chains are a few hundred tokens: too short for CMC's schedule."""


SERVED: Final = {"store": Path("autotts.db")}
"""Defaults of `autotts serve`, which records unless it is told not to."""
PREFIX: Final = "AUTOTTS_"
FILE: Final = Path("autotts.toml")
"""The file that is read where no other is named."""
FLAG, ENVIRONMENT, EMBEDDED_DEFAULT, DEFAULT = "flag", "environment", "embedded default", "default"
"""Where a setting may come from, besides a file."""


class Configured(NamedTuple):
    """Settings, and where each of them comes from."""

    settings: Settings
    sources: Mapping[str, str]  # by setting: FLAG, ENVIRONMENT, `file NAME`, EMBEDDED_DEFAULT or DEFAULT


def load(**overrides: object) -> Settings:
    """Settings from flags (`overrides`, None meaning not given) and the environment. Raises SettingsError."""
    return configure(None, overrides).settings


def find_file(named: Path | None = None) -> Path | None:
    """The file that settings are read from: the one that is `named`, here or by AUTOTTS_CONFIG, else `FILE` or none."""
    if named is None and (variable := os.environ.get(f"{PREFIX}CONFIG")):
        named = Path(variable)
    return named or (FILE if FILE.exists() else None)


def configure(file: Path | None, flags: Mapping[str, object], defaults: Mapping[str, object] = {}) -> Configured:
    """Settings from `flags` (None meaning not given), the environment, a TOML file and `defaults`, which win over the
    model's own. Raises SettingsError, naming what is wrong and where."""
    given = {name: value for name, value in flags.items() if value is not None}
    _refuse_unknown(given, "")
    filed = {} if file is None else _read(file)
    in_environment = {name for name in Settings.model_fields if _variable(name)}
    sources = dict.fromkeys(Settings.model_fields, DEFAULT)
    sources |= dict.fromkeys(filed, f"file {file}")
    sources |= dict.fromkeys(in_environment, ENVIRONMENT)
    sources |= dict.fromkeys(given, FLAG)
    filed = {name: value for name, value in filed.items() if name not in in_environment}
    try:
        settings = Settings(**{**filed, **given})
    except ValidationError as error:
        raise SettingsError(_one_line(error, sources)) from None
    unset = {name: value for name, value in defaults.items() if sources[name] == DEFAULT}
    if settings.upstream is None:
        embedded = {name: value for name, value in EMBEDDED.items() if sources[name] == DEFAULT}
        sources |= dict.fromkeys(embedded, EMBEDDED_DEFAULT)
        unset |= embedded
    if not settings.record:
        unset["store"] = None
    settings = settings.model_copy(update=unset)
    _check_controller(settings)
    _check_upstream(settings)
    _check_files(settings)
    _check_spill(settings)
    return Configured(settings, sources)


def is_secret(name: str) -> bool:
    """Whether a setting is, or holds, what nobody else may read."""
    return _holds_secret(Settings.model_fields[name].annotation)


def _holds_secret(annotation: Any) -> bool:
    return annotation is SecretStr or any(map(_holds_secret, get_args(annotation)))


def _variable(name: str) -> str | None:
    """What the environment says of a setting; blank is nothing."""
    known = PREFIX + name.upper()
    return next((value for key, value in os.environ.items() if key.upper() == known and value), None)


def _read(file: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises SettingsError."""
    try:
        with file.open("rb") as opened:
            filed = tomllib.load(opened)
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    _refuse_unknown(filed, f"{file}: ")
    return filed


def _refuse_unknown(given: Mapping[str, object], where: str) -> None:
    for name in given:
        if name not in Settings.model_fields:
            near = get_close_matches(name, Settings.model_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{where}there is no setting {name!r}{hint}")


def _check_controller(settings: Settings) -> None:
    try:
        spec = parse_spec(settings.controller)
    except ControllersError as error:
        raise SettingsError(f"controller: {error}") from None
    if not spec.is_foreign and is_admin_only(spec.name):
        raise SettingsError(f"controller: {spec.name} is for requests that admins make; name another")
    if spec.is_foreign and (wrong := name_problem(spec.name)):
        raise SettingsError(f"controller: {wrong}")


def _check_upstream(settings: Settings) -> None:
    has_user = settings.upstream is not None and (settings.upstream.username or settings.upstream.password)
    if has_user and settings.upstream_api_key is not None:
        words = "its URL holds a user or password, and there is an upstream_api_key: only one of them can be sent"
        raise SettingsError(f"upstream: {words}")


def _check_files(settings: Settings) -> None:
    """Refuse files that are the store's: closing one drops the locks by which SQLite protects the store."""
    if settings.store is None:
        return
    for name, path in settings:
        if not isinstance(path, Path) or name == "store":
            continue
        if any(_is_of_store(place, settings.store) for place in (places(path) if name == "spill" else [path])):
            raise SettingsError(f"{name}: {path} is the store's; name a file of its own")


def _is_of_store(path: Path, store: Path) -> bool:
    """Whether a path leads to a store, or to its log, index or journal, by whatever name."""
    of_store = [Path(f"{store.resolve()}{end}") for end in DATABASE_FILES]
    return path.resolve() in of_store or any(path.exists() and one.exists() and path.samefile(one) for one in of_store)


def _check_spill(settings: Settings) -> None:
    """What is at `spill` is written over and removed: it must be nothing else."""
    if settings.spill is None or settings.store is None:
        return
    try:
        is_taken = is_foreign(settings.spill)
    except OSError as error:
        raise SettingsError(f"spill: {settings.spill}: {error.strerror}") from None
    if is_taken:
        raise SettingsError(f"spill: {settings.spill} is there and no file of records; name one that is free")


def _one_line(error: ValidationError, sources: Mapping[str, str]) -> str:
    return "; ".join(
        _told(tuple(map(str, e["loc"])), _problem(e), e["input"], sources) for e in error.errors(include_url=False)
    )


def _problem(error: ErrorDetails) -> str:
    """Describe the problem of a value, or the form it must have."""
    name = str(error["loc"][0]) if error["loc"] else ""
    field = Settings.model_fields.get(name)
    if error["type"] == "string_pattern_mismatch" and field is not None and field.description:
        return f"it must be: {field.description}"
    return error["msg"].removeprefix("Value error, ")


def _told(place: tuple[str, ...], words: str, value: object, sources: Mapping[str, str]) -> str:
    """What is wrong with one value: what, where it was set, and, unless it is secret, what it is."""
    name = place[0] if place else ""
    source = sources.get(name, DEFAULT)
    where = f"{source.removeprefix('file ')}: " if source.startswith("file ") else ""
    variable = f" ({PREFIX}{name.upper()})" if source == ENVIRONMENT else ""
    is_shown = name in Settings.model_fields and not is_secret(name) and not (name == "upstream" and "@" in str(value))
    shown = f", not {value!r}" if is_shown else ""
    return f"{where}{'.'.join(place)}{variable}: {words}{shown}"
