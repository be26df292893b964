"""Plan of a collection: what is recorded, and how many tokens one branch of it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from discovery.data.importers import RecordingLine

PROBE_TOKENS: Final = 64
"""Upper bound on a probe's tokens, for the reserve of a branch."""
MIN_INTERVAL: Final = 32
"""Tokens between probes that are assumed until the proxy's interval is known."""
CLOSING_TOKENS: Final = 1024
"""Tokens of a request's limit that the proxy reserves to close its reply, in addition to an eighth of the limit."""

REPLY_KINDS: Final = ("tools", "json")
"""Answer kinds of whole replies, which are not probed."""

BranchKey = tuple[str, int]
"""A branch: the `question_id` of its question, and its number among that question's branches."""


@dataclass(frozen=True)
class CollectionPlan:
    """Questions' branches to record, and how they are requested."""

    model: str  # empty: the only one the proxy serves
    benchmark: str  # name of the questions' benchmark
    branches: int  # per question
    answer: str = "auto"  # answer kind by which answers are extracted
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None  # per branch
    keep_text: bool = False  # store questions, not only their hashes
    signals: bool = False  # record confidences too; branches with and without them belong to one plan
    longest: int = 0  # tokens a branch may have if `max_tokens` is not set; 0 if unknown

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling fields of each request; fields that are not set are left out."""
        fields = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that distinguish the branches of two plans; stored in their `sampling`."""
        return self.sampling | ({} if self.answer == "auto" else {"answer": self.answer})

    @property
    def identity(self) -> list[Any]:
        """The values that distinguish this plan from others in the same file."""
        return [self.model, self.benchmark, self.settings]

    def reserved_tokens(self, interval: int | None) -> int:
        """Return the most tokens a branch may cost. `interval` is the tokens between probes, or None if unknown."""
        tokens = self.max_tokens or self.longest
        probes = 0 if self.answer in REPLY_KINDS else -(-tokens // (interval or MIN_INTERVAL))
        return (tokens + probes * PROBE_TOKENS) * 8 // 7 + CLOSING_TOKENS

    def includes(self, line: RecordingLine) -> bool:
        """Return whether `line` was recorded under this plan."""
        names = ("temperature", "top_p", "max_tokens", "answer")
        settings = {name: value for name in names if (value := line.sampling.get(name)) is not None}
        return [line.model, line.benchmark, settings] == self.identity
