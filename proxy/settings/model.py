"""Definitions of the settings: type, bounds, default and description of each."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, get_args

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from controllers.builtin import DEFAULT
from discovery.store.databases.places import DatabaseUrl, StorePlace
from proxy.probe_templates import Family
from proxy.settings.bearer_token import BearerToken
from proxy.settings.places import RegistrySetting, StoreSetting
from proxy.settings.redis_url import RedisUrl
from proxy.settings.upstreams import check_session_header, check_upstream
from proxy.types import Otherwise

Beta = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]


def _check_rising(text: str) -> str:
    low, _, high = text.partition(":")
    if float(low) > float(high):
        raise ValueError("the first value, at which β begins to shrink, is larger than the second; swap them")
    return text


Watermarks = Annotated[str, Field(pattern=r"^\d{1,9}(\.\d{1,9})?:\d{1,9}(\.\d{1,9})?$"), AfterValidator(_check_rising)]

_RESERVED_FLAGS: Final = ("--host", "--port", "--outlive-parent")


def _check_vllm_flags(text: str) -> str:
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the flags cannot be read: {error}") from None
    for flag in flags:
        if flag.partition("=")[0] in _RESERVED_FLAGS:
            raise ValueError(f"the proxy itself sets {flag.partition('=')[0]}; remove it")
    return text


class AwayPolicy(StrEnum):
    """Treatment of requests with limits while the shared limits cannot be reached."""

    LOCAL = "local"  # each process counts its own requests
    REFUSE = "refuse"  # they are refused


class StoreText(StrEnum):
    """Text of requests that is stored."""

    NONE = "none"  # hashes of questions and answers
    HASH = "hash"  # answers as written, and hashes of questions
    FULL = "full"  # questions, answers and replies as written


class LogForm(StrEnum):
    """Format of log lines."""

    PLAIN = "plain"  # for people
    JSON = "json"  # one JSON object per line


class Settings(BaseSettings):
    """Settings of one proxy process, read once at start."""

    model_config = SettingsConfigDict(env_prefix="AUTOTTS_", env_ignore_empty=True, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8400, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    workers: int = Field(
        1,
        ge=1,
        le=64,
        description="processes that share the port, about one per core; limits of a process are divided among them",
    )
    log: LogForm = Field(LogForm.PLAIN, description="format of log lines: `plain`, or `json` (one object per line)")

    upstream: Annotated[str, AfterValidator(check_upstream)] | None = Field(
        None,
        repr=False,
        description="base URL of vLLM, several of them separated by commas, `dns+http://NAME:PORT` for all addresses "
        'of a name, or a TOML file with lines such as `"MODEL" = ["URL", "URL"]`; without it the embedded model is '
        "started. A user and password in a URL are never logged",
    )
    upstream_api_key: BearerToken | None = Field(None, description="bearer token for the upstreams")
    spill_load: float = Field(
        0.8,
        gt=0,
        allow_inf_nan=False,
        description="load of an upstream, as branches in flight over `AUTOTTS_BRANCHES_IN_FLIGHT`, from which new "
        "requests go to the next one of several",
    )
    dns_poll_s: Seconds = Field(
        10, description="seconds after which the name in `dns+http://NAME:PORT` is resolved again"
    )
    session_header: Annotated[str, AfterValidator(check_session_header)] | None = Field(
        None,
        description="name of a header that is sent to the upstream with an id that all generations of a request share, "
        "for routers in front of replicas: `x-session-id`",
    )
    embedded_args: Annotated[str, AfterValidator(_check_vllm_flags)] | None = Field(
        None,
        description="extra `vllm serve` flags for the embedded model, quoted as in a shell; ignored with an upstream",
    )
    model: str | None = Field(
        None, description="model for requests that name none; by default the first that the upstream lists"
    )

    model_aliases: bool = Field(True, description="also list each model as NAME@0.25, @0.5, @0.75 and @1, which set β")

    controller: str = Field(DEFAULT, description="controller for requests that name none: a name or FILE.py")
    tools_controller: str = Field(
        DEFAULT, description="controller for requests with tools that name none; one without probes: a name or FILE.py"
    )
    json_controller: str = Field(
        DEFAULT,
        description="controller for requests that constrain the format of the reply, as `response_format` does, and "
        "name none; one without probes",
    )
    reply_controller: str = Field(
        DEFAULT,
        description="controller for other requests whose branches are whole replies of the upstream, as images and "
        "penalties need them, and that name none; one without probes",
    )
    select_controller: str = Field(
        "self_consistency",
        description="controller for requests whose replies the model compares (`tts.answer` is `select` or "
        "`synthesise`), and that name none; one without probes",
    )
    judge_tokens: Tokens = Field(
        1024, description="tokens of the model's answer when it chooses a reply, its thought included"
    )
    beta: Beta | None = Field(None, description="β for requests that set none; without it they are passed through")
    required: bool = Field(
        False,
        description="refuse requests that set β but cannot be served by a controller, instead of passing them through; "
        "`tts.required` in a request overrides it",
    )
    calibration: Path | None = Field(
        None, description="calibration file written by `autotts calibrate`: cost and accuracy of β by model"
    )
    min_agreement: Beta | None = Field(
        None,
        description="share of the votes that an answer should have; without it, or with 0, any share will do. "
        "`tts.min_agreement` in a request overrides it",
    )
    otherwise: Otherwise = Field(
        Otherwise.FLAG,
        description="what follows if an answer has fewer votes: `answer` (nothing), `flag` (the reply is flagged) or "
        "`escalate` (the episode continues once at a larger β, and is flagged if that does not help); `tts.otherwise` "
        "in a request overrides it",
    )
    escalate_beta: Beta = Field(
        1.0, description="β at which an episode continues to `escalate`; `tts.escalate_beta` in a request overrides it"
    )
    max_branches: int = Field(64, ge=1, description="branches that one request may open")
    max_total_tokens: Tokens | None = Field(None, description="tokens that one request may spend, over all branches")
    deadline_s: Seconds | None = Field(
        None, description="seconds after which a request is answered with what it has generated"
    )

    decision_s: Seconds = Field(
        0.25, description="seconds a sandboxed controller may take for a decision before it is killed"
    )
    sandbox_pool: int = Field(8, ge=0, le=256, description="sandbox processes kept ready for a controller from a file")
    allow_unsandboxed: bool = Field(
        False,
        description="run controllers from files without a sandbox, with all rights of the proxy and access to its keys",
    )

    registry: RegistrySetting = Field(
        None,
        description="registry of installed controllers: a folder, or a `postgresql://` URL; by default the database of "
        "a store in PostgreSQL. Without a registry the configured controller serves",
    )
    registry_poll_s: float = Field(
        1,
        ge=0,
        allow_inf_nan=False,
        description="seconds between checks of the registry for changes, which PostgreSQL also announces",
    )
    retired_metrics_s: Seconds = Field(600, description="seconds that series of retired controllers and models stay")

    admin_key: BearerToken | None = Field(
        None,
        description="bearer token of admins, who may see every request and record branches; without it there are no "
        "admins",
    )

    keys: Path | None = Field(
        None, description="file of client keys, with lines from `autotts keys new`; without it no key is needed"
    )
    client_keys: SecretStr | None = Field(
        None, description="more client keys, as NAME=HASH separated by commas or new lines; read once"
    )
    allow_anonymous: bool = Field(False, description="listen on addresses other than loopback without client keys")
    allowed_hosts: str | None = Field(
        None,
        pattern=r"^\s*(\*|(\*\.)?[A-Za-z0-9._-]+)(\s*,\s*(\*|(\*\.)?[A-Za-z0-9._-]+))*\s*$",
        description="host names under which a proxy without keys may be reached, besides localhost and IP addresses, "
        "separated by commas: `tts.example.org,*.internal`; `*` allows any",
    )
    allowed_origins: str | None = Field(
        None,
        pattern=r"^\s*(\*|[a-z][a-z0-9+.-]*://[^\s,/]+)(\s*,\s*(\*|[a-z][a-z0-9+.-]*://[^\s,/]+))*\s*$",
        description="origins of web pages that may call the proxy from a browser, separated by commas: "
        "`https://app.example.org`; `*` allows any; without it no CORS headers are sent",
    )
    key_metrics: bool = Field(False, description="count tokens by key; all readers of `/metrics` see names of keys")
    ui: bool = Field(True, description="serve the dashboard under `/ui`")
    ui_session_s: Seconds = Field(43_200, description="seconds after which users of the dashboard must sign in again")
    ui_runs: Path | None = Field(
        None,
        description="folder of searches, frontiers and collections that the dashboard lists, and in which admins start "
        "searches; without it there are none",
    )
    ui_import_bytes: int = Field(
        64 * 2**20, ge=1, description="largest file of recordings that admins may import in the dashboard, in bytes"
    )
    cache_secret: SecretStr | None = Field(
        None,
        description="secret from which each tenant's salt of the upstream's prefix cache is derived; use the same for "
        "all proxies; drawn at start if not set",
    )

    tokens_per_minute: Tokens | None = Field(None, description="tokens per minute over all requests")
    max_episodes: int = Field(256, ge=1, description="requests served by controllers at the same time; others wait")
    max_passed: int = Field(1024, ge=1, description="requests passed through at the same time; others wait")
    branches_in_flight: int = Field(
        1024,
        ge=1,
        description="branches generated at the same time by each upstream, over all requests; others wait. vLLM runs "
        "256 to 1024, set by its `--max-num-seqs`",
    )
    queue: int = Field(
        1024, ge=0, description="requests of each kind that may wait; further ones are refused with status 429"
    )

    limits: RedisUrl | None = Field(
        None,
        description="URL of a Redis (`redis://` or, with TLS, `rediss://`) that counts tokens per minute and the "
        "`episodes` of keys over all proxies that use it; without it each process counts its own",
    )
    limits_away: AwayPolicy = Field(
        AwayPolicy.LOCAL,
        description="what happens while that Redis is away: `local` (each process counts its own requests) or `refuse` "
        "(requests that need a limit get 503)",
    )

    feedback_per_minute: int = Field(
        1200,
        ge=1,
        description="feedback requests per minute and key (callers without a key share one limit); further ones are "
        "refused with status 429",
    )

    load_waiting: Watermarks | None = Field(
        None,
        description="numbers of requests waiting at the upstream at which β begins and stops to shrink: `4:32`",
    )
    load_cache: Watermarks | None = Field(
        None, description="shares of the KV cache in use at which β begins and stops to shrink: `0.8:0.95`"
    )
    load_factor: Beta = Field(0.25, description="factor applied to β under full load")

    record: bool = Field(True, description="record requests in the store")
    store: StoreSetting = Field(
        None,
        description="replay store in which requests are recorded: a file, or a `postgresql://` URL; without it nothing "
        "is recorded",
    )
    store_text: StoreText = Field(
        StoreText.NONE,
        description="text that is stored: `none` (no text, but hashes of questions and answers), `hash` (answers as "
        "written; of questions only hashes), `full` (questions, answers and replies as written)",
    )
    retain_days: Annotated[float, Field(gt=0, le=36500, allow_inf_nan=False)] | None = Field(
        None,
        description="days after which a request and all its records are deleted, 36500 at most; without it they are "
        "kept",
    )
    recorder_queue: int = Field(
        10_000, ge=1, description="records that may wait in memory; further ones are lost and counted"
    )
    spill: Path | None = Field(
        None,
        description="file for records while the store cannot be written; by default it is next to the store. It must "
        "not be used for anything else",
    )
    spill_bytes: int = Field(256 * 2**20, ge=0, description="maximum bytes of all spill files together")
    record_fraction: float = Field(
        0.02,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of requests whose branches are completed after the answer, so that they can be replayed",
    )
    record_branches: int = Field(
        16, ge=0, le=1024, description="branches in such a recording, however few its controller opened"
    )
    record_at_once: int = Field(4, ge=1, le=1024, description="branches completed at the same time")
    record_tokens_per_hour: Tokens = Field(1_000_000, description="tokens per hour for completing branches")

    interval: Tokens = Field(512, description="tokens per interval (Δ): controllers decide after each interval")
    branch_temperature: float | None = Field(
        None,
        gt=0,
        le=2,
        description="temperature of all branches but the first when a request asks for 0 (the first is greedy); by "
        "default the model's own",
    )
    probe_family: Family = Field(Family.AUTO, description="model family whose probe template is used")
    probe_close: str | None = Field(None, description="text that closes a thought, in place of the family's")
    probe_lead: str | None = Field(
        None,
        pattern=r"\{$",
        description="text that leads into the answer, in place of the family's; it ends with an opening brace",
    )
    probe_tokens: Tokens = Field(20, description="tokens that a probe may generate")
    finalise_tokens: Tokens = Field(512, description="tokens for turning an unfinished branch into a reply")

    connect_timeout_s: Seconds = Field(5, description="seconds for connecting to the upstream")
    read_timeout_s: Seconds = Field(
        600, description="seconds without a byte after which an upstream response times out"
    )
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="largest request body, in bytes")
    max_sent_bytes: int = Field(
        2 * 2**30,
        ge=1024,
        description="bytes that one request may send upstream. Each interval sends the text of its branch again. At "
        "the limit the request is answered with what it has generated",
    )
    max_bodies_bytes: int = Field(
        512 * 2**20,
        ge=2**20,
        description="bytes of request bodies above 64 KiB held at the same time; further ones are refused. One key may "
        "use half",
    )
    head_s: Seconds = Field(10, description="seconds for the head of a request to arrive")
    body_s: Seconds = Field(300, description="seconds for the body of a request to arrive")
    body_rate: int = Field(
        1024,
        ge=0,
        description="average bytes per second at which a body must arrive, after its first 20 s; 0 sets no minimum",
    )
    write_s: Seconds = Field(
        60, description="seconds after which a connection whose client does not read its response is closed"
    )
    keep_alive_s: Seconds = Field(75, description="seconds that an idle connection is kept open")
    max_connections: int = Field(
        8192,
        ge=1,
        description="open client connections; beyond that the connection that has been idle or sending its request "
        "longest is closed",
    )
    max_connections_per_address: int = Field(
        4096,
        ge=1,
        description="open connections of one client address (an IPv6 /64 network counts as one); beyond that its "
        "longest idle connection is closed",
    )
    drain_s: float = Field(
        60,
        ge=0,
        allow_inf_nan=False,
        description="seconds that running requests have to end after SIGTERM, SIGINT or SIGHUP",
    )
    ping_s: float = Field(
        10, gt=0, le=15, description="seconds between keep-alive comments on a stream without output, 15 at most"
    )

    @property
    def registry_place(self) -> StorePlace | None:
        """Where the registry is: by default in the database of a store in PostgreSQL."""
        if self.registry is not None or not isinstance(self.store, DatabaseUrl):
            return self.registry
        return self.store

    @property
    def embedded_flags(self) -> tuple[str, ...]:
        """The flags in `embedded_args`."""
        return tuple(shlex.split(self.embedded_args or ""))


def is_secret(name: str) -> bool:
    """Return whether a setting is a secret, which is never shown."""
    return _holds_secret(Settings.model_fields[name].annotation)


def _holds_secret(annotation: Any) -> bool:
    return annotation is SecretStr or any(map(_holds_secret, get_args(annotation)))
