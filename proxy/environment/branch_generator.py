"""Generate the branches and probes of one request on the upstream: contexts, sampling, calls and their bill."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from controllers.signals import NO_SIGNALS, Signal
from proxy import probe_templates
from proxy.environment.call_continuation import continue_elsewhere, derive_seed
from proxy.environment.stop_strings import StopStrings
from proxy.environment.token_meter import TokenMeter
from proxy.environment.votability import VotabilityState
from proxy.errors import UpstreamError
from proxy.token_ids import Context, ids_json
from proxy.types import STREAM_INTERVAL, Call, EnvironmentLimits, LiveBranch, Output, Prompt
from proxy.upstream.detokeniser import CallDecoder, Detokeniser
from proxy.upstream.fleet.interface import Upstream

OPEN_STREAM_INTERVAL: Final = 8
"""Maximum number of tokens per chunk while it is not confirmed that the task can be voted on."""
MIN_CHUNKS: Final = 4
"""Minimum number of chunks into which the tokens of a short call are split."""


class BranchGenerator:
    """Sends one request's calls to the upstream, bills them, and keeps track of the outputs in flight."""

    def __init__(
        self,
        engine: Upstream,
        prompt: Prompt,
        limits: EnvironmentLimits,
        votability: VotabilityState,
        signals: frozenset[Signal] = NO_SIGNALS,
    ) -> None:
        self.engine = engine
        self.prompt = prompt
        self.limits = limits
        self.is_background = False  # the answer has gone out
        self._priority = prompt.priority
        self.meter = TokenMeter()
        self.stops = StopStrings(prompt.stop, prompt.template, prompt.tail)
        self._votability = votability
        self._signals = signals
        self._decoder = CallDecoder(prompt.ids)
        self._prompt_json = ids_json(prompt.ids)
        self._in_flight: list[tuple[LiveBranch | None, Output]] = []  # each with the branch it continues, if any

    def move_to(self, engine: Upstream, priority: int) -> None:
        """Send all further calls to `engine` with this priority. A larger priority is served later."""
        self.engine, self._priority, self.is_background = engine, priority, True

    @property
    def detokeniser(self) -> Detokeniser:
        """A detokeniser for the request's model."""
        return Detokeniser(self.engine, self.prompt.model)

    def context(self, branch: LiveBranch) -> Context:
        """Return the token ids of the prompt and of `branch`, which may grow afterwards."""
        return Context((self.prompt.ids, self._prompt_json), (branch.ids, branch.encoded.of(branch.ids)))

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
            sampling["seed"] = derive_seed(self.prompt.seed, index, piece)
        return sampling

    def branch_call(
        self, contexts: Sequence[Sequence[int]], max_tokens: int, sampling: Mapping[str, Any], n: int = 1
    ) -> Call:
        """Return a call that continues branches with these contexts. It asks for the signals of intervals if needed."""
        is_needed = Signal.INTERVALS in self._signals
        return Call(contexts, max_tokens, sampling, n, needs_log_probabilities=is_needed)

    def probe_call(self, contexts: Sequence[Sequence[int]], suffix_tokens: int) -> Call:
        """Return a call for probes with these contexts. It asks for the signals of probes if needed."""
        is_needed = Signal.PROBES in self._signals
        return Call(
            contexts,
            self.limits.probe,
            probe_templates.sampling(),
            suffix_tokens=suffix_tokens,
            needs_log_probabilities=is_needed,
            needs_token_texts=is_needed,
        )

    async def generate(self, call: Call) -> None:
        """Run `call` and bill it, however it ends. The text of its outputs is decoded from their ids."""
        with self.meter.billing(call):
            error = await self._send(call)
            if error is not None:
                await continue_elsewhere(call, error, self.engine, self.meter, self._send)

    async def _send(self, call: Call) -> UpstreamError | None:
        """Run `call`. Return the error if another replica may continue the outputs, whose text is decoded then, too."""
        self.meter.sent_bytes += call.size
        call.priority, call.salt = self._priority, self.prompt.salt
        call.stream_interval = self._stream_interval(call.max_tokens)
        if call.suffix_tokens and self.prompt.template in probe_templates.TEMPLATES.values():
            return await self._try(call)  # it continues plain text, so that the server's text is correct
        async with self._decoder.over(call, self.detokeniser) as decode:
            error = await self._try(call)
            if error is not None:
                await asyncio.gather(*(decode(output) for output in call.outputs if output.finish is None))
        return error

    async def _try(self, call: Call) -> UpstreamError | None:
        try:
            await self.engine.generate(self.prompt.model, call)
        except UpstreamError as error:
            if call.progress and self.engine.can_continue(error):
                return error
            raise
        return None

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
        call.needs_log_probabilities = owner is not None and Signal.INTERVALS in self._signals
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
