"""Every setting of the proxy, with its unit. Read once, from flags, then `AUTOTTS_*` variables, then these defaults."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AnyHttpUrl, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from controllers.errors import ControllersError
from controllers.installed import wrong_name
from controllers.loading import parse_spec
from controllers.registry import is_admin_only
from proxy.errors import SettingsError
from proxy.probing import Family

Beta = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]


class StoreText(StrEnum):
    """What of a request's text is written down."""

    NONE = "none"  # hashes of questions and answers, answers by number
    HASH = "hash"  # answers as they are written; questions by their hash
    FULL = "full"  # questions too


class Settings(BaseSettings):
    """Frozen; one object is made at start and handed down."""

    model_config = SettingsConfigDict(env_prefix="AUTOTTS_", frozen=True, extra="forbid")

    upstream: AnyHttpUrl | None = Field(None, description="vLLM's base URL; none starts the embedded model")
    upstream_api_key: SecretStr | None = Field(None, description="bearer token sent to the upstream")
    model: str | None = Field(None, description="model for requests that name none; none takes the upstream's first")

    controller: str = Field("cmc", description="controller that serves requests which name none: a name or FILE.py")
    beta: Beta | None = Field(None, description="β for requests that set none; none passes them through untouched")
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

    store: Path | None = Field(None, description="replay store that requests are recorded in; none records nothing")
    store_text: StoreText = Field(
        StoreText.NONE,
        description="what of questions and answers is stored: `none` (hashes), `hash` (answers, and questions by their "
        "hash), `full`",
    )
    retain_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="days after which a request is forgotten with all that came of it; none keeps it"
    )
    recorder_queue: int = Field(10_000, ge=1, description="records that may wait in memory; what comes then is lost")
    spill: Path | None = Field(
        None, description="file that records go to while the store cannot be written; none puts it beside the store"
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
    branch_temperature: float = Field(
        1.0, gt=0, le=2, description="temperature of branches when the request asks for 0: equal branches vote in vain"
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
    ping_s: Seconds = Field(10, description="seconds between keep-alive comments on a stream that is thinking")


EMBEDDED = {"interval": 32, "finalise_tokens": 48, "probe_tokens": 8, "controller": "parallel_probe"}
"""Defaults that suit the embedded model, whose chains are a few hundred tokens: too short for CMC's schedule."""


def load(**overrides: object) -> Settings:
    """Settings from flags (`overrides`, None meaning not given) and the environment. Raises SettingsError."""
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        settings = Settings(**given)  # type: ignore[arg-type]
        if settings.upstream is None:
            unset = {name: value for name, value in EMBEDDED.items() if name not in settings.model_fields_set}
            settings = settings.model_copy(update=unset)
        spec = parse_spec(settings.controller)
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None
    except ControllersError as error:
        raise SettingsError(f"controller: {error}") from None
    if not spec.is_foreign and is_admin_only(spec.name):
        raise SettingsError(f"controller: {spec.name} is for requests that admins make; name another")
    if spec.is_foreign and (wrong := wrong_name(spec.name)):
        raise SettingsError(f"controller: {wrong}")
    return settings


def _one_line(error: ValidationError) -> str:
    problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors())
    return "; ".join(problems)
