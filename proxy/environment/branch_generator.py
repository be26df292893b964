"""Generate the branches and probes of one request on the upstream: contexts, sampling, calls and their bill."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final

from proxy import probe_templates
from proxy.environment.stop_strings import StopStrings
from proxy.environment.token_meter import TokenMeter
from proxy.environment.votability import VotabilityState
from proxy.errors import UpstreamError
from proxy.types import STREAM_INTERVAL, Call, EnvironmentLimits, LiveBranch, Output, Prompt
from proxy.upstream.client import UpstreamClient
from proxy.upstream.detokeniser import CallDecoder, Detokeniser

OPEN_STREAM_INTERVAL: Final = 8
"""Maximum number of tokens per chunk while it is not confirmed that the task can be voted on."""
MIN_CHUNKS: Final = 4
"""Minimum number of chunks into which the tokens of a short call are split."""


class BranchGenerator:
    """Sends one request's calls to the upstream, bills them, and keeps track of the outputs in flight."""

    def __init__(
        self, engine: UpstreamClient, prompt: Prompt, limits: EnvironmentLimits, votability: VotabilityState
    ) -> None:
        self.engine = engine
        self.prompt = prompt
        self.limits = limits
        self.priority = 0
        self.meter = TokenMeter()
        self.stops = StopStrings(prompt.stop, prompt.template, prompt.tail)
        self._votability = votability
        self._decoder = CallDecoder(prompt.ids)
        self._in_flight: list[tuple[LiveBranch | None, Output]] = []  # each with the branch it continues, if any

    def move_to(self, engine: UpstreamClient, priority: int) -> None:
        """Send all further calls to `engine` with this priority. A larger priority is served later."""
        self.engine, self.priority = engine, priority

    @property
    def detokeniser(self) -> Detokeniser:
        """A detokeniser for the request's model."""
        return Detokeniser(self.engine, self.prompt.model)

    def context(self, branch: LiveBranch) -> list[int]:
        """Return the token ids of the prompt and of `branch`."""
        return [*self.prompt.ids, *branch.ids]

    async def suffix(self, text: str, *, lead: bool) -> list[int]:
        """Return ids that close the thought in a branch's `text` and, with `lead`, begin its answer."""
        build_suffix = self.prompt.template.suffix if lead else self.prompt.template.closing
        return await self.engine.tokenise_suffix(self.prompt.model, build_suffix(self.prompt.tail, text))

    def is_greedy(self, index: int) -> bool:
        """Return whether branch `index` is generated at temperature 0."""
        return index == 0 and self.prompt.greedy_first

    def sampling(self, text: str, index: int, piece: int = 0) -> dict[str, Any]:
        """Return the sampling parameters of a call that continues branch `index`, whose text is `text`.

        If the client sets a seed, branches do not share calls, and each call of a branch gets its own seed. `piece` is
        the number of the call. vLLM would give every prompt of a call the same seed, and so generate equal branches.
        """
        sampling = dict(self.prompt.sampling)
        if self.is_greedy(index):
            sampling["temperature"] = 0.0
        if stops := self.stops.at_server(text):
            sampling["stop"] = stops
        if self.prompt.template.special:
            sampling["skip_special_tokens"] = False
        if self.prompt.seed is not None:
            sampling["seed"] = _derive_seed(self.prompt.seed, index, piece)
        return sampling

    async def generate(self, call: Call) -> None:
        """Run `call` and bill it, however it ends. The text of its outputs is decoded from their ids."""
        meter = self.meter
        meter.first = meter.first or call
        meter.sent_bytes += call.size
        call.priority, call.salt = self.priority, self.prompt.salt
        call.stream_interval = self._stream_interval(call.max_tokens)
        ends_in_plain_text = call.suffix_tokens and self.prompt.template in probe_templates.TEMPLATES.values()
        try:
            if ends_in_plain_text:  # the server's text is then correct
                await self.engine.generate(self.prompt.model, call)
            else:
                async with self._decoder.over(call, self.detokeniser):
                    await self.engine.generate(self.prompt.model, call)
        except BaseException as error:
            meter.aborted_tokens += call.generated
            if call.generated or not isinstance(error, UpstreamError):  # otherwise generation had not begun
                meter.max_unseen_tokens += call.max_unseen_tokens
            raise
        meter.add(call)

    async def generate_one(
        self,
        context: Sequence[int],
        max_tokens: int,
        sampling: Mapping[str, Any],
        owner: LiveBranch | None = None,
        *,
        suffix: int = 0,
    ) -> Output:
        """Generate one continuation of `context` in its own call, and return it.

        The last `suffix` tokens of `context` come from the proxy. If the call is aborted, its output so far belongs to
        `owner`.
        """
        call = Call([context], max_tokens, sampling, suffix_tokens=suffix)
        self._in_flight = [(owner, call.outputs[0])]
        await self.generate(call)
        self._in_flight = []
        return call.outputs[0]

    async def generate_all(self, calls: Sequence[Call], owners: Sequence[tuple[LiveBranch | None, Output]]) -> None:
        """Run `calls` concurrently. The first to fail cancels the others, and its error is raised.

        `owners` gives the branch that each output continues; None for the output of a probe.
        """
        self._in_flight = list(owners)
        tasks = [asyncio.create_task(self.generate(call)) for call in calls]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._in_flight = []

    def take_in_flight(self) -> list[tuple[LiveBranch, Output]]:
        """Return and clear the outputs of aborted calls, each with the branch that it continues.

        Outputs whose text is not decoded yet are dropped.
        """
        outputs = [
            (owner, output) for owner, output in self._in_flight if owner is not None and output.server_text is None
        ]
        self._in_flight.clear()
        return outputs

    def _stream_interval(self, max_tokens: int) -> int:
        """Return the number of tokens per chunk for a call of up to `max_tokens` per output.

        Tokens that have not arrived when a call is aborted are not billed, so chunks are small where aborts are likely.
        While votability is not confirmed calls are often aborted, and a short call may have delivered one token only.
        """
        if not self._votability.confirmed:
            return max(1, min(OPEN_STREAM_INTERVAL, max_tokens // MIN_CHUNKS))
        return STREAM_INTERVAL if max_tokens >= STREAM_INTERVAL else max(1, max_tokens // MIN_CHUNKS)


def _derive_seed(seed: int, branch: int, piece: int) -> int:
    """Return a seed for one call of one branch. Two calls with the same seed would draw the same numbers."""
    digest = blake2b(f"{seed}/{branch}/{piece}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF
