"""Whether the upstream still is what recordings were made with.

A chat template cannot be asked for over HTTP, but what it makes of a conversation can: that is hashed, dates left out,
for some templates write today's.
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
LOOK_S: Final = 300.0
"""Seconds between looks at the upstream."""
AGAIN_S: Final = 3.0
"""Seconds between them while upstream or store is not up, and after a failure."""
MOST_MODELS: Final = 100
"""Models that are looked at each time, by three requests each; others are when somebody asks for them."""
_TAIL: Final = 8
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2} [A-Z][a-z]{2,8} \d{4}|[A-Z][a-z]{2,8} \d{1,2}, \d{4}")


class ModelFingerprint(NamedTuple):
    """What a model's requests are made with now."""

    model: str
    chat_template: str
    probe_template: str
    interval: int
    branch_temperature: float | str  # of sampled branches when a request asks for 0; DEFAULT_TEMPERATURE is the model's

    def changes(self, made: Sequence[Version]) -> list[str]:
        """What of it recordings were not made with, in words; theirs are the versions `made`, the latest first."""
        if not made:
            return []
        known = made[0]
        drawn = (json.loads(one.sampling).get("branch_temperature") for one in made)
        pairs = (
            ("model", known.model, self.model),
            ("chat template", known.chat_template, self.chat_template),
            ("probe template", known.probe_template, self.probe_template),
            ("interval", known.interval, self.interval),
            ("branch temperature", next(filter(None, drawn), None), self.branch_temperature),
        )
        return [f"{name} {str(before)!r} to {str(now)!r}" for name, before, now in pairs if before and before != now]


class _NotMadeYet(Exception):
    """The recorder has yet to create the store; until then there is nothing to compare with."""


class TemplateDrift:
    """What the upstream's chat templates are now, and how that compares with a store."""

    def __init__(self, engine: UpstreamClient, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._aside = engine.for_background()
        self._settings = settings
        self._metrics = metrics
        self._seen: dict[str, ModelFingerprint] = {}  # by model
        self._looked: dict[str, float] = {}  # when, by the monotonic clock
        self._told: set[ModelFingerprint] = set()
        self._complaint = ""  # why nothing could be compared, as last told
        self._failed = asyncio.Event()  # the upstream, lately
        self._task: asyncio.Task[None] | None = None

    async def template(self, model: str) -> str:
        """The hash of a model's chat template. Raises UpstreamError."""
        if model not in self._seen:
            await self._see(self._engine, model)
        return self._seen[model].chat_template

    async def confirm(self, plan: Plan, since: float) -> None:
        """See that a plan's chat template still is its model's, or was `since`, a time of the monotonic clock.

        Raises UpstreamError.
        """
        model = plan.prompt.model
        if model not in self._seen or self._looked[model] < since:
            await self._see(self._aside, model)
        if self._seen[model].chat_template != plan.provenance.chat_template:
            raise UpstreamError("the model's chat template has changed meanwhile", code="upstream_changed")

    def has_usual_probe(self, plan: Plan) -> bool:
        """Whether a plan's branches are asked as those of the model's conversations are, as far as it was seen."""
        seen = self._seen.get(plan.prompt.model)
        return seen is not None and seen.probe_template == plan.prompt.template.name

    def report_upstream_failure(self) -> None:
        """The upstream has failed, and may come back as another."""
        self._failed.set()

    def open(self) -> None:
        """Look now and then, and tell what has changed."""
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """See what the upstream's models are asked with now. Raises UpstreamError."""
        models = [model.id for model in await self._aside.models()][:MOST_MODELS]
        for model in models:
            await self._see(self._aside, model)
        self._seen = {model: self._seen[model] for model in models}

    async def _see(self, engine: UpstreamClient, model: str) -> None:
        now, settings = time.monotonic(), self._settings
        ids = await _rendered(engine, model)
        text = await engine.detokenise(model, ids) if ids else ""
        tail = await engine.detokenise(model, ids[-_TAIL:]) if ids else ""
        template = probe_templates.template_for(
            settings.probe_family, tail, close=settings.probe_close, lead=settings.probe_lead
        )
        digest = blake2b(_DATE.sub("DATE", text).encode(), digest_size=16).hexdigest() if text else ""
        branch_temperature = settings.branch_temperature or DEFAULT_TEMPERATURE
        self._seen[model] = ModelFingerprint(model, digest, template.name, settings.interval, branch_temperature)
        self._looked[model] = now

    async def _watch(self) -> None:
        while True:
            wait_s = LOOK_S if await self._try() else AGAIN_S
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), wait_s)
                await asyncio.sleep(AGAIN_S)  # it is hardly back yet, and fails more than once
            self._failed.clear()

    async def _try(self) -> bool:
        """Whether what there is could be looked at and compared."""
        complaint = ""
        try:
            await self.look()
            await self._compare()
        except _NotMadeYet:
            return False
        except Exception as error:  # whatever it is, the next look may do
            complaint = error.logged if isinstance(error, UpstreamError) else f"{type(error).__name__}: {error}"
        if complaint not in ("", self._complaint):
            logger.info("chat templates and recordings are not compared: %s", complaint)
        self._complaint = complaint
        return not complaint

    async def _compare(self) -> None:
        """Tell of models whose latest recordings were made otherwise than they would be now. Raises StoreError."""
        path = self._settings.store
        if path is None:
            return
        if not path.exists() or not path.stat().st_size:
            if path.parent.is_dir():
                raise _NotMadeYet
            raise StoreError(f"{path}: there is no folder {path.parent}")
        async with Store.open(path) as store:
            for model, seen in self._seen.items():
                changes = seen.changes(await store.versions(model) or await self._of_others(store))
                self._metrics.recording_drift.labels(model).set(len(changes))
                if changes and seen not in self._told:
                    self._told.add(seen)
                    logger.warning(
                        "%s is not what its latest recordings were made with (%s); those are not mixed with new ones",
                        *(model, ", ".join(changes)),
                    )

    async def _of_others(self, store: Store) -> list[Version]:
        """The versions of models that are not served any more: one of them may have another name now."""
        models = {summary.cell.model for summary in await store.summaries()} - self._seen.keys()
        return [version for model in sorted(models) for version in await store.versions(model)]


async def _rendered(engine: UpstreamClient, model: str) -> Sequence[int]:
    """The ids of a conversation; of less of it where the template refuses a part; none if it refuses all."""
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[-1:]):
        with suppress(UpstreamRefused):
            return await engine.tokenise_chat({"model": model, "messages": list(messages)})
    return []
