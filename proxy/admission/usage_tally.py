"""Tally of what each configured key has spent since the process started, whether it has limits or not."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Final

KEY_KINDS: Final = ("generated", "prompt", "passed_through", "passed_through_prompt")
"""Kinds of tokens that the metrics count by key."""


@dataclass
class SpentTokens:
    """Requests that spent tokens, and these tokens. Prompts are known of requests that controllers served."""

    served: int = 0  # by controllers
    served_tokens: int = 0  # of branches and probes with their suffixes, as in the bill
    prompt_tokens: int = 0  # of replies, each prompt once and without suffixes
    passed: int = 0  # through
    passed_tokens: int = 0

    def as_json(self) -> dict[str, dict[str, int]]:
        """Return it as it appears in `GET /v1/tts/keys`."""
        return {
            "served": {
                "requests": self.served,
                "tokens": self.served_tokens,
                "prompt_tokens": self.prompt_tokens,
            },
            "passed_through": {"requests": self.passed, "tokens": self.passed_tokens},
        }


Count = Callable[[str, str, int], object]
"""Counts tokens of a key, by kind, in the metrics."""


class KeyTally:
    """Adds the requests of one key to its sums, to the total and, if `key` is given, to the metrics."""

    def __init__(self, *sums: SpentTokens, key: str = "", count: Count | None = None) -> None:
        self._sums = sums
        self._key = key
        self._counter = count

    def add_served(self, tokens: int) -> None:
        """Add a request that a controller served."""
        for spent in self._sums:
            spent.served += 1
            spent.served_tokens += tokens
        self._count("generated", tokens)

    def add_prompt(self, tokens: int) -> None:
        """Add the prompt of a request that a controller served."""
        for spent in self._sums:
            spent.prompt_tokens += tokens
        self._count("prompt", tokens)

    def add_passed(self, tokens: int, prompt_tokens: int) -> None:
        """Add a request that was passed through. Its prompt counts in the metrics only."""
        for spent in self._sums:
            spent.passed += 1
            spent.passed_tokens += tokens
        self._count("passed_through", tokens)
        self._count("passed_through_prompt", prompt_tokens)

    def _count(self, kind: str, tokens: int) -> None:
        if self._counter is not None and self._key and tokens:
            self._counter(self._key, kind, tokens)


class UsageTally:
    """Sums by key. Callers without a key only count in the total, because they could send any token."""

    def __init__(self, count: Count | None = None) -> None:
        self.total = SpentTokens()
        self._count = count
        self._by_key: dict[str, SpentTokens] = {}

    def keep(self, keys: Container[str]) -> None:
        """Forget all keys but these, which are configured now."""
        self._by_key = {key: spent for key, spent in self._by_key.items() if key in keys}

    def of(self, key: str) -> SpentTokens:
        """Return the sums of a key."""
        return self._by_key.get(key, SpentTokens())

    def adder(self, key: str) -> KeyTally:
        """Return what adds the requests of a caller; `key` is empty for callers without one."""
        if not key:
            return KeyTally(self.total)
        return KeyTally(self.total, self._by_key.setdefault(key, SpentTokens()), key=key, count=self._count)
