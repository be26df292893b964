"""Chat requests whose branches are whole replies of the upstream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from discovery.answers.code import CodeTask


class JudgeLimits(NamedTuple):
    """Task of the judge of replies, and limits on its cost."""

    writes: bool  # it writes a new reply; otherwise it names one
    answer_tokens: int  # most tokens of its answer
    cap: int | None  # tokens of the whole episode, the judge included


class ReplyRequest(NamedTuple):
    """A chat request whose branches are whole replies of the upstream, and what their vote needs to know of it."""

    body: Mapping[str, Any]  # sent for each branch, apart from `seed` and `temperature`
    tools: Mapping[str, Any]  # JSON schema of the arguments, by tool
    exclude: Sequence[str] = ()  # arguments that are not compared
    expects_json: bool = False  # the content of a reply must be JSON
    schema: Any = None  # JSON schema of the content, if the client gives one
    judge: JudgeLimits | None = None  # if the model compares the replies that have no vote
    code: CodeTask | None = None  # if functions in the replies are compared by what they return
    branch_tokens: int = 0  # most tokens of a branch without a token cap

    @property
    def has_votes(self) -> bool:
        """Whether labels of replies are votes. Otherwise they only tell apart the replies that the model compares."""
        return self.judge is None or bool(self.tools) or self.code is not None

    @property
    def is_replayable(self) -> bool:
        """Whether the votes of its replies can be compared later, without the model."""
        return self.judge is None and self.code is None
