"""Detect that the upstream's model, chat template or settings differ from those of the recordings.

The upstream does not return its chat template over HTTP, but it renders a conversation with it. The hash of the
rendered text identifies the template. Dates are removed first, because some templates insert the current date.
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
from pathlib import Path
from typing import Final, NamedTuple

from discovery.data.recordings import DEFAULT_TEMPERATURE, Version
from discovery.errors import StoreError, StoreNotCreated
from discovery.store import Store
from proxy import probe_templates
from proxy.errors import UpstreamError, UpstreamRefused
from proxy.settings import Settings
from proxy.telemetry.metrics import Metrics
from proxy.types import Plan
from proxy.upstream.fleet.interface import Upstream

logger = logging.getLogger(__name__)

CONVERSATION: Final = tuple(
    {"role": role, "content": content}
    for role, content in (("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "3 + 3?"))
)
"""Conversation that is rendered to identify the template."""
POLL_S: Final = 300.0
"""Seconds between checks of the upstream."""
RETRY_S: Final = 3.0
"""Seconds between checks while the upstream or the store is unavailable, and after a failure."""
MAX_MODELS: Final = 100
"""Maximum number of models per check, with three requests each. Other models are checked when they are requested."""
_TAIL: Final = 8
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2} [A-Z][a-z]{2,8} \d{4}|[A-Z][a-z]{2,8} \d{1,2}, \d{4}")


class ModelFingerprint(NamedTuple):
    """Current settings of a model's requests."""

    model: str
    chat_template: str
    probe_template: str
    interval: int
    branch_temperature: float | str  # for requests at temperature 0; DEFAULT_TEMPERATURE means the model's default

    def changes_since(self, versions: Sequence[Version]) -> list[str]:
        """Describe how the settings differ from those of recordings, whose `versions` begin with the latest."""
        if not versions:
            return []
        latest = versions[0]
        temperatures = (json.loads(version.sampling).get("branch_temperature") for version in versions)
        pairs = (
            ("model", latest.model, self.model),
            ("chat template", latest.chat_template, self.chat_template),
            ("probe template", latest.probe_template, self.probe_template),
            ("interval", latest.interval, self.interval),
            ("branch temperature", next(filter(None, temperatures), None), self.branch_temperature),
        )
        return [f"{name} {str(before)!r} to {str(now)!r}" for name, before, now in pairs if before and before != now]


class TemplateDrift:
    """Fingerprints of the upstream's models, which are compared with the recordings in the store."""

    def __init__(self, engine: Upstream, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._background = engine.for_background()
        self._settings = settings
        self._metrics = metrics
        self._fingerprints: dict[str, ModelFingerprint] = {}  # by model
        self._checked_at: dict[str, float] = {}  # by model; times of the monotonic clock
        self._warned: set[ModelFingerprint] = set()
        self.changes: dict[str, list[str]] = {}  # by model: how it differs from its latest recordings
        self._problem = ""  # latest problem that prevented a comparison
        self._failed = asyncio.Event()  # the upstream has failed since the last check
        self._task: asyncio.Task[None] | None = None

    async def template_hash(self, model: str) -> str:
        """Return the hash of a model's chat template. Raises UpstreamError."""
        if model not in self._fingerprints:
            await self._fingerprint(self._engine, model)
        return self._fingerprints[model].chat_template

    async def confirm(self, plan: Plan, since: float) -> None:
        """Check that the model's chat template is still the plan's. Raises UpstreamError if not, or if that fails.

        The upstream is not asked again if it was checked after `since`, a time of the monotonic clock.
        """
        model = plan.prompt.model
        if model not in self._fingerprints or self._checked_at[model] < since:
            await self._fingerprint(self._background, model)
        if self._fingerprints[model].chat_template != plan.provenance.chat_template:
            raise UpstreamError("the model's chat template has changed meanwhile", code="upstream_changed")

    def has_usual_probe(self, plan: Plan) -> bool:
        """Return whether a plan uses the probe template that the model's other conversations use."""
        fingerprint = self._fingerprints.get(plan.prompt.model)
        return fingerprint is not None and fingerprint.probe_template == plan.prompt.template.name

    def report_upstream_failure(self) -> None:
        """Schedule a check soon, because the upstream may come back with another model or template."""
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
        self._checked_at = {model: self._checked_at[model] for model in models}
        self._warned = {warned for warned in self._warned if warned.model in self._fingerprints}
        self.changes = {model: changes for model, changes in self.changes.items() if model in self._fingerprints}

    async def _fingerprint(self, engine: Upstream, model: str) -> None:
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
        task = asyncio.current_task()
        while True:
            wait_s = POLL_S if await self._check() else RETRY_S
            if task is not None and task.cancelling():  # an error of the interrupted check took its place
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._failed.wait()
                await asyncio.sleep(RETRY_S)  # failures come in groups, and a restart takes time
            self._failed.clear()

    async def _check(self) -> bool:
        """Update the fingerprints and compare them. Return whether that worked."""
        problem = ""
        try:
            await self.refresh()
            await self._compare()
        except StoreNotCreated:  # there is nothing to compare with
            return False
        except StoreError as error:
            problem = str(error)
        except Exception as error:  # any failure: the next check may work
            problem = error.logged if isinstance(error, UpstreamError) else f"{type(error).__name__}: {error}"
        if problem not in ("", self._problem):
            logger.info("cannot compare chat templates with recordings: %s", problem)
        self._problem = problem
        return not problem

    async def _compare(self) -> None:
        """Warn about models whose latest recordings were made with other settings. Raises StoreError."""
        place = self._settings.store
        if place is None:
            return
        if isinstance(place, Path) and (not place.exists() or not place.stat().st_size):
            if place.parent.is_dir():
                raise StoreNotCreated(f"{place}: there is no store yet")
            raise StoreError(f"{place}: folder {place.parent} does not exist")
        async with Store.open(place) as store:
            for model, fingerprint in self._fingerprints.items():
                changes = fingerprint.changes_since(await store.versions(model) or await self._of_others(store))
                self.changes[model] = changes
                self._metrics.recording_drift.labels(model).set(len(changes))
                if changes and fingerprint not in self._warned:
                    self._warned.add(fingerprint)
                    logger.warning(
                        "%s differs from its latest recordings (%s); new recordings are kept apart from those",
                        *(model, ", ".join(changes)),
                    )

    async def _of_others(self, store: Store) -> list[Version]:
        """Return the versions of models that are not served now, because the model may have been renamed."""
        models = {summary.cell.model for summary in await store.summaries()} - self._fingerprints.keys()
        return [version for model in sorted(models) for version in await store.versions(model)]


async def _rendered(engine: Upstream, model: str) -> Sequence[int]:
    """Return the ids of the longest end of the conversation that the template accepts. Empty if it accepts none."""
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[-1:]):
        with suppress(UpstreamRefused):
            return await engine.tokenise_chat({"model": model, "messages": list(messages)})
    return []
