"""Whether the upstream still is what recordings were made with.

A chat template cannot be asked for over HTTP, but what it makes of a conversation can: that is hashed, dates left out,
for some templates write today's.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Final, NamedTuple

from discovery.errors import StoreError
from discovery.recordings import Version
from discovery.store import Store
from proxy import probing
from proxy.engine import Engine
from proxy.errors import UpstreamError, UpstreamRefused
from proxy.metrics import Metrics
from proxy.settings import Settings

logger = logging.getLogger(__name__)

CONVERSATION: Final = tuple(
    {"role": role, "content": content}
    for role, content in (("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "3 + 3?"))
)
LOOK_S: Final = 300.0
"""Seconds between looks at the upstream."""
_TAIL: Final = 8
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2} [A-Z][a-z]{2,8} \d{4}|[A-Z][a-z]{2,8} \d{1,2}, \d{4}")


class Seen(NamedTuple):
    """What a model's requests are made with now."""

    chat_template: str
    probe_template: str
    interval: int

    def changes(self, known: Version) -> list[str]:
        """What of it recordings were not made with, in words."""
        pairs = (
            ("chat template", known.chat_template, self.chat_template),
            ("probe template", known.probe_template, self.probe_template),
            ("interval", str(known.interval), str(self.interval)),
        )
        return [f"{name} {before[:12]!r} to {now[:12]!r}" for name, before, now in pairs if before and before != now]


class Drift:
    """What the upstream's chat templates are now, and how that compares with a store."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._seen: dict[str, Seen] = {}  # by model
        self._told: set[tuple[str, Seen]] = set()
        self._task: asyncio.Task[None] | None = None

    async def template(self, model: str) -> str:
        """The hash of a model's chat template. Raises UpstreamError."""
        if model not in self._seen:
            self._seen[model] = await self._see(model)
        return self._seen[model].chat_template

    def open(self) -> None:
        """Look now and then, and tell what has changed."""
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def look(self) -> None:
        """See what the upstream's models are asked with now. Raises UpstreamError."""
        for model in await self._engine.models():
            self._seen[model.id] = await self._see(model.id)

    async def _see(self, model: str) -> Seen:
        ids = await _rendered(self._engine, model)
        text = await self._engine.detokenise(model, ids) if ids else ""
        settings = self._settings
        tail = await self._engine.detokenise(model, ids[-_TAIL:]) if ids else ""
        template = probing.template_for(
            settings.probe_family, tail, close=settings.probe_close, lead=settings.probe_lead
        )
        digest = blake2b(_DATE.sub("DATE", text).encode(), digest_size=16).hexdigest() if text else ""
        return Seen(digest, template.name, settings.interval)

    async def _watch(self) -> None:
        while True:
            try:
                await self.look()
                await self._compare()
            except UpstreamError as error:
                logger.info("chat templates and recordings are not compared: %s", error.logged)
            except StoreError as error:
                logger.info("chat templates and recordings are not compared: %s", error)
            await asyncio.sleep(LOOK_S)

    async def _compare(self) -> None:
        """Tell of models whose latest recordings were made otherwise than they would be now."""
        path = self._settings.store
        if path is None or not path.exists() or not path.stat().st_size:  # none yet, or just being made
            return
        async with Store.open(path) as store:
            for model, seen in self._seen.items():
                versions = await store.versions(model)
                changes = seen.changes(versions[0]) if versions else []
                self._metrics.drift.labels(model).set(len(changes))
                if changes and (model, seen) not in self._told:
                    self._told.add((model, seen))
                    logger.warning(
                        "%s is not what its latest recordings were made with (%s); those are not mixed with new ones",
                        *(model, ", ".join(changes)),
                    )


async def _rendered(engine: Engine, model: str) -> Sequence[int]:
    """The ids of a conversation; of less of it where the template refuses a part; none if it refuses all."""
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[-1:]):
        with suppress(UpstreamRefused):
            return await engine.tokenise_chat({"model": model, "messages": list(messages)})
    return []
