"""Apply the client's stop strings. They end the reply, but the thought before it may contain them.

The server does not distinguish the thought from the reply, so it would cut the thought. Stop strings are therefore sent
only once the reply has begun. Until then a branch runs in pieces of bounded length, and its text is searched here.
Later text is searched here too, because the server cannot see a string that spans two requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from proxy.probe_templates import Template

MAX_AT_SERVER: Final = 4
"""Maximum number of stop strings that every vLLM accepts. VLLM_MAX_STOP_STRINGS may allow more, but is not reported."""
OPENING_TOKENS: Final = 16
"""Number of tokens after which it is clear whether a text begins with a thought."""


class StopStrings:
    """The stop strings of one request, applied to the texts of its branches."""

    def __init__(self, strings: Sequence[str], template: Template, prompt_tail: str) -> None:
        self.strings = tuple(strings)
        self._template = template
        self._tail = prompt_tail

    def __bool__(self) -> bool:
        return bool(self.strings)

    def at_server(self, text: str) -> list[str]:
        """Return the stop strings to send with a request that continues a branch's `text`."""
        if not self.strings:
            return []
        has_begun = self._template.reply_at(self._tail, text) is not None
        return list(self.strings) if has_begun and len(self.strings) <= MAX_AT_SERVER else []

    def max_tokens(self, text: str, interval: int, wanted: int) -> int:
        """Return how many of the `wanted` tokens one request may generate for a branch with this text."""
        if not self.strings or self.at_server(text):
            return wanted
        is_open = self._template.reply_at(self._tail, text) is None and not self._template.thinking(self._tail, text)
        return min(wanted, interval, OPENING_TOKENS if is_open and not text.strip("\n") else interval)

    def cut(self, text: str, known: int = 0) -> int | None:
        """Return the index at which a stop string ends a branch's text; None if there is none in its reply.

        The first `known` characters contain no complete stop string.
        """
        begin = self._template.reply_at(self._tail, text) if self.strings else None
        if begin is None:
            return None
        indices = [text.find(string, max(begin, known - len(string) + 1)) for string in self.strings]
        return min((index for index in indices if index >= 0), default=None)

    def trim(self, text: str) -> str:
        """Return a reply up to the first stop string in it."""
        indices = [index for string in self.strings if (index := text.find(string)) >= 0]
        return text[: min(indices)] if indices else text
