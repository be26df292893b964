"""The client's stop strings. They end the reply; the thought before it may contain them.

A server that knows nothing of thoughts would cut them in the middle, before there is an answer. Strings are therefore
given to it only once the reply has begun. Until then a branch runs in pieces of bounded length, and its text is
searched here. It is searched afterwards too, for a server cannot see a string that two requests share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from proxy.probe_templates import Template

MOST_AT_SERVER: Final = 4
"""Stop strings that any vLLM takes; its VLLM_MAX_STOP_STRINGS may allow more, but cannot be asked for."""
OPENING_TOKENS: Final = 16
"""Tokens after which a text has shown whether it begins with a thought."""


class StopStrings:
    """The stop strings of one request, over the texts of its branches."""

    def __init__(self, strings: Sequence[str], template: Template, prompt_tail: str) -> None:
        self.strings = tuple(strings)
        self._template = template
        self._tail = prompt_tail

    def __bool__(self) -> bool:
        return bool(self.strings)

    def at_server(self, text: str) -> list[str]:
        """The strings a request may carry that goes on with a branch's `text`."""
        begun = self._template.reply_at(self._tail, text) is not None
        return list(self.strings) if begun and len(self.strings) <= MOST_AT_SERVER else []

    def most(self, text: str, interval: int, most: int) -> int:
        """Tokens that a branch with `text` may be given in one request, of the `most` it is to get."""
        if not self.strings or self.at_server(text):
            return most
        is_open = self._template.reply_at(self._tail, text) is None and not self._template.thinking(self._tail, text)
        return min(most, interval, OPENING_TOKENS if is_open and not text.strip("\n") else interval)

    def cut(self, text: str, known: int = 0) -> int | None:
        """Where a branch's text ends by a string in its reply; None if it goes on.

        Its first `known` characters hold no whole string.
        """
        begin = self._template.reply_at(self._tail, text) if self.strings else None
        if begin is None:
            return None
        places = [text.find(string, max(begin, known - len(string) + 1)) for string in self.strings]
        return min((place for place in places if place >= 0), default=None)

    def trim(self, text: str) -> str:
        """A reply up to the first string in it."""
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        return text[: min(places)] if places else text
