"""Detect that the upstream's model, chat template or settings differ from those that recordings were made with.

The upstream does not return a chat template over HTTP, but it renders a conversation with it. The hash of the rendered
text identifies the template. Dates are left out, because some templates insert the current date.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Final, NamedTuple

from discovery.data.recordings import DEFAULT_TEMPERATURE, Version
from discovery.errors import StoreError
from discovery.store import Store
from proxy import probe_templates
from proxy.errors import UpstreamError, UpstreamRefused
from proxy.settings import Settings
from proxy.telemetry.metrics import Metrics
from proxy.types import Plan
from proxy.upstream.client import UpstreamClient

logger = logging.getLogger(__name__)

CONVERSATION: Final = tuple(
    {"role": role, "content": content}
    for role, content in (("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "3 + 3?"))
)
POLL_S: Final = 300.0
"""Seconds between checks of the upstream."""
RETRY_S: Final = 3.0
"""Seconds between checks while the upstream or the store is unavailable, and after a failure."""
MAX_MODELS: Final = 100
"""Models checked each time, by three requests each. Other models are checked when they are requested."""
_TAIL: Final = 8
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2} [A-Z][a-z]{2,8} \d{4}|[A-Z][a-z]{2,8} \d{1,2}, \d{4}")


class ModelFingerprint(NamedTuple):
    """The settings that a model's requests use now."""

    model: str
    chat_template: str
    probe_template: str
    interval: int
    branch_temperature: float | str  # for requests at temperature 0; DEFAULT_TEMPERATURE is the model's own

    def changes_since(self, made: Sequence[Version]) -> list[str]:
        """Describe how the settings differ from those of recordings. `made` are their versions, the latest first."""
        if not made:
            return []
        known = made[0]
        drawn = (json.loads(version.sampling).get("branch_temperature") for version in made)
        pairs = (
            ("model", known.model, self.model),
            ("chat template", known.chat_template, self.chat_template),
            ("probe template", known.probe_template, self.probe_template),
            ("interval", known.interval, self.interval),
            ("branch temperature", next(filter(None, drawn), None), self.branch_temperature),
        )
        return [f"{name} {str(before)!r} to {str(now)!r}" for name, before, now in pairs if before and before != now]


class _NotMadeYet(Exception):
    """The store does not exist yet, so there is nothing to compare with."""


class TemplateDrift:
    """The fingerprints of the upstream's models, compared with the recordings in the store."""

    def __init__(self, engine: UpstreamClient, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._background = engine.for_background()
        self._settings = settings
        self._metrics = metrics
        self._fingerprints: dict[str, ModelFingerprint] = {}  # by model
        self._checked_at: dict[str, float] = {}  # by model; times of the monotonic clock
        self._warned: set[ModelFingerprint] = set()
        self._problem = ""  # why nothing could be compared, as last logged
        self._failed = asyncio.Event()  # the upstream has failed since the last check
        self._task: asyncio.Task[None] | None = None

    async def template_hash(self, model: str) -> str:
        """Return the hash of a model's chat template. Raises UpstreamError."""
        if model not in self._fingerprints:
            await self._fingerprint(self._engine, model)
        return self._fingerprints[model].chat_template

    async def confirm(self, plan: Plan, since: float) -> None:
        """Check that a plan's chat template is still its model's. A check `since` that monotonic time is not repeated.

        Raises UpstreamError if it has changed, or cannot be checked.
        """
        model = plan.prompt.model
        if model not in self._fingerprints or self._checked_at[model] < since:
            await self._fingerprint(self._background, model)
        if self._fingerprints[model].chat_template != plan.provenance.chat_template:
            raise UpstreamError("the model's chat template has changed meanwhile", code="upstream_changed")

    def has_usual_probe(self, plan: Plan) -> bool:
        """Return whether a plan probes its branches with the template of the model's usual conversations."""
        known = self._fingerprints.get(plan.prompt.model)
        return known is not None and known.probe_template == plan.prompt.template.name

    def report_upstream_failure(self) -> None:
        """Check again soon, because the upstream may come back with another model or template."""
        self._failed.set()

    def open(self) -> None:
        """Start checking periodically."""
        self._task = asyncio.create_task(self._poll())

    async def close(self) -> None:
        """Stop checking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self) -> None:
        """Update the fingerprints of all models. Raises UpstreamError."""
        models = [model.id for model in await self._background.models()][:MAX_MODELS]
        for model in models:
            await self._fingerprint(self._background, model)
        self._fingerprints = {model: self._fingerprints[model] for model in models}

    async def _fingerprint(self, engine: UpstreamClient, model: str) -> None:
        now, settings = time.monotonic(), self._settings
        ids = await _rendered(engine, model)
        text = await engine.detokenise(model, ids) if ids else ""
        tail = await engine.detokenise(model, ids[-_TAIL:]) if ids else ""
        template = probe_templates.template_for(
            settings.probe_family, tail, close=settings.probe_close, lead=settings.probe_lead
        )
        digest = blake2b(_DATE.sub("DATE", text).encode(), digest_size=16).hexdigest() if text else ""
        temperature = settings.branch_temperature or DEFAULT_TEMPERATURE
        self._fingerprints[model] = ModelFingerprint(model, digest, template.name, settings.interval, temperature)
        self._checked_at[model] = now

    async def _poll(self) -> None:
        while True:
            wait_s = POLL_S if await self._check() else RETRY_S
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), wait_s)
                await asyncio.sleep(RETRY_S)  # failures come in groups, and it is not back at once
            self._failed.clear()

    async def _check(self) -> bool:
        """Refresh and compare. Return whether that worked."""
        problem = ""
        try:
            await self.refresh()
            await self._compare()
        except _NotMadeYet:
            return False
        except Exception as error:  # any failure: the next check may work
            problem = error.logged if isinstance(error, UpstreamError) else f"{type(error).__name__}: {error}"
        if problem not in ("", self._problem):
            logger.info("cannot compare chat templates with recordings: %s", problem)
        self._problem = problem
        return not problem

    async def _compare(self) -> None:
        """Warn of models whose latest recordings were made with other settings. Raises StoreError."""
        path = self._settings.store
        if path is None:
            return
        if not path.exists() or not path.stat().st_size:
            if path.parent.is_dir():
                raise _NotMadeYet
            raise StoreError(f"{path}: folder {path.parent} does not exist")
        async with Store.open(path) as store:
            for model, fingerprint in self._fingerprints.items():
                changes = fingerprint.changes_since(await store.versions(model) or await self._of_others(store))
                self._metrics.recording_drift.labels(model).set(len(changes))
                if changes and fingerprint not in self._warned:
                    self._warned.add(fingerprint)
                    logger.warning(
                        "%s differs from its latest recordings (%s); new recordings are kept apart from those",
                        *(model, ", ".join(changes)),
                    )

    async def _of_others(self, store: Store) -> list[Version]:
        """Return the versions of models that are no longer served, because one of them may have been renamed."""
        models = {summary.cell.model for summary in await store.summaries()} - self._fingerprints.keys()
        return [version for model in sorted(models) for version in await store.versions(model)]


async def _rendered(engine: UpstreamClient, model: str) -> Sequence[int]:
    """Return the ids of the conversation, or of as much of it as the template accepts; none if it accepts nothing."""
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[-1:]):
        with suppress(UpstreamRefused):
            return await engine.tokenise_chat({"model": model, "messages": list(messages)})
    return []
