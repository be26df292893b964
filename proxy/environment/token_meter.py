"""Count the tokens and calls that the upstream spends on one request."""

from __future__ import annotations

from dataclasses import dataclass

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

    def add(self, call: Call) -> None:
        """Count a call that succeeded."""
        self.requests += 1
        self.prompt_tokens += call.prompt_tokens
        self.generated_tokens += call.generated
        self.suffix_tokens += call.suffix_tokens
        if call.cached_tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + call.cached_tokens
