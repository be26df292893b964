"""Count the tokens and calls that the upstream spends on one request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from proxy.errors import UpstreamError
from proxy.types import Call


@dataclass(slots=True)
class TokenMeter:
    """Tokens and calls that the upstream has spent on one request, according to its usage reports."""

    requests: int = 0
    prompt_tokens: int = 0  # includes the context that every call sends again
    cached_tokens: int | None = None  # prompt tokens from the prefix cache; None if the server does not report them
    first: Call | None = None  # the first call
    generated_tokens: int = 0
    suffix_tokens: int = 0  # prompt tokens that the proxy wrote itself: the suffixes of probes
    judge_tokens: int = 0  # of these two, what a call that compared whole replies cost
    aborted_tokens: int = 0  # tokens that aborted calls delivered
    max_unseen_tokens: int = 0  # upper bound on tokens that aborted calls generated but did not deliver; not billed
    sent_bytes: int = 0  # approximate size of all request bodies

    @property
    def first_cached(self) -> int | None:
        """Prompt tokens that were cached before the request arrived; None if the server does not report them."""
        return None if self.first is None else self.first.cached_tokens

    @property
    def billed(self) -> int:
        """All tokens of the request except its prompt: generated, aborted, and suffixes."""
        return self.completed + self.aborted_tokens

    @property
    def completed(self) -> int:
        """Billed tokens of calls that were not aborted."""
        return self.generated_tokens + self.suffix_tokens

    @contextmanager
    def billing(self, call: Call) -> Iterator[None]:
        """Return a context in which `call` runs. It is billed however it ends."""
        self.first = self.first or call
        try:
            yield
        except BaseException as error:
            self.aborted_tokens += call.generated
            if call.generated or not isinstance(error, UpstreamError):  # otherwise generation had not begun
                self.max_unseen_tokens += call.max_unseen_tokens
            raise
        self.add(call)

    def add(self, call: Call) -> None:
        """Count a call that succeeded."""
        self.requests += 1
        self.prompt_tokens += call.prompt_tokens
        self.generated_tokens += call.generated
        self.suffix_tokens += call.suffix_tokens
        if call.cached_tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + call.cached_tokens
