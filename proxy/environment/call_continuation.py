"""Continue calls that a replica failed to finish: another replica generates the rest of each output from its ids.

A branch is only its token ids, so any replica can continue it, and the output of a probe too. What has arrived is kept
and billed once. The rest may have as many tokens as were left, so that no limit is exceeded.

    call        prompt ──► a b c ✗                     3 of 8 tokens arrived
    its rest    prompt a b c ──► d e f g h             5 tokens at another replica, added to the same output
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from typing import Final

from proxy.environment.token_meter import TokenMeter
from proxy.errors import UpstreamError
from proxy.types import Call, Output
from proxy.upstream.fleet.interface import Upstream

MAX_CONTINUATIONS: Final = 2
"""Maximum number of times that a call is continued. It bounds the harm of a request that makes replicas fail."""

Send = Callable[[Call], Awaitable[UpstreamError | None]]
"""Runs a call. Returns the error of a replica after which the outputs may be continued, and raises others."""


def derive_seed(seed: int, branch: int, piece: int) -> int:
    """Return a seed for one call of one branch. Two calls with the same seed would draw the same numbers."""
    digest = blake2b(f"{seed}/{branch}/{piece}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF


async def continue_elsewhere(call: Call, error: UpstreamError, engine: Upstream, meter: TokenMeter, send: Send) -> None:
    """Generate the rest of a call's outputs. `error` ended the call. Raises UpstreamError if other replicas fail too.

    The tokens that replicas report for the prompts of the rest are those of the call. The call that failed had none.
    """
    for attempt in range(1, MAX_CONTINUATIONS + 1):
        meter.max_unseen_tokens += call.max_unseen_tokens
        rests = [_Rest(outputs, call, attempt, meter) for outputs in _by_tokens_left(call).values()]
        meter.requests += len(rests)
        errors = await _run_all([rest.run(send) for rest in rests])
        if not errors:
            return
        error = errors[0]
        if not engine.can_continue(error):
            break
    raise error


def _by_tokens_left(call: Call) -> dict[int, list[tuple[Sequence[int], Output]]]:
    """Return the unfinished outputs with their prompts, by the number of tokens that each may still have."""
    groups: dict[int, list[tuple[Sequence[int], Output]]] = defaultdict(list)
    for index, output in enumerate(call.outputs):
        left = call.max_tokens - len(output.ids)
        if output.finish is None and left <= 0:
            output.finish = "length"  # all tokens had arrived
        elif output.finish is None:
            groups[left].append((call.prompts[index // call.n], output))
    return groups


class _Rest:
    """The rest of some outputs of a call, as a call of its own."""

    def __init__(
        self, outputs: Sequence[tuple[Sequence[int], Output]], call: Call, attempt: int, meter: TokenMeter
    ) -> None:
        left = call.max_tokens - len(outputs[0][1].ids)
        sampling = dict(call.sampling)
        if "seed" in sampling:  # calls with a seed have one output
            sampling["seed"] = derive_seed(sampling["seed"], len(outputs[0][1].ids), attempt)
        self._whole = call
        self._meter = meter
        self.call = Call([[*prompt, *output.ids] for prompt, output in outputs], left, sampling)
        self.call.needs_log_probabilities = call.needs_log_probabilities
        self.call.needs_token_texts = call.needs_token_texts
        self.call.on_finish = self._take_finished
        self._targets = {id(new): old for new, (_, old) in zip(self.call.outputs, outputs, strict=True)}

    async def run(self, send: Send) -> UpstreamError | None:
        """Run the call, and add what arrives to the outputs however it ends."""
        try:
            error = await send(self.call)
        finally:
            for output in self.call.outputs:
                self._take(output)
        self._whole.prompt_tokens += self.call.prompt_tokens
        return error

    async def _take_finished(self, output: Output) -> None:
        target = self._targets[id(output)]
        self._take(output)
        if self._whole.on_finish is not None:
            await self._whole.on_finish(target)

    def _take(self, output: Output) -> None:
        """Add an output to the one that it continues. Tokens whose text is unknown are billed as aborted instead."""
        target = self._targets.pop(id(output), None)
        if target is None:
            return
        if output.server_text is not None:
            self._meter.aborted_tokens += len(output.ids)
            return
        target.ids += output.ids
        target.text += output.text
        target.finish, target.ended_by_token = output.finish, output.ended_by_token
        target.log_probabilities += output.log_probabilities
        target.token_texts += output.token_texts


async def _run_all(runs: Sequence[Awaitable[UpstreamError | None]]) -> list[UpstreamError]:
    """Run all concurrently. Return the errors after which outputs may be continued. Any other cancels the rest."""
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        return [error for error in await asyncio.gather(*tasks) if error is not None]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
