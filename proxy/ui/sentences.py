"""Sentences and names that pages share: why an episode stopped, and what tokens were spent on."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

STOPS: Final = MappingProxyType(
    {
        "answered": "the controller had enough votes to answer",
        "max_tokens": "a limit on tokens was reached",
        "deadline": "the deadline passed",
        "not_votable": "the first branches gave nothing that could be voted on",
        "controller_error": "the controller failed",
        "upstream_error": "the upstream failed",
        "disconnected": "the client disconnected",
        "draining": "the proxy was shutting down",
        "failed": "the proxy could not produce a reply",
    }
)
"""Why an episode stopped, after `because`."""
SELECTORS: Final = MappingProxyType(
    {
        "vote": "The votes decided which reply was sent",
        "judge": "The model compared the replies and decided which was sent",
        "overlap": "The reply that shares most words with the others was sent",
    }
)
"""Ways to decide among whole replies, as sentences without their full stop."""
TOKEN_KINDS: Final = MappingProxyType(
    {
        "winner": "the branch that became the reply",
        "agreeing": "other branches with the same answer",
        "losing": "branches with another answer",
        "pruned": "branches that were pruned",
        "probe": "probes",
        "finalise": "closing an unfinished branch",
        "judge": "the model comparing replies",
        "aborted": "requests that were aborted",
        "passed_through": "requests without a controller",
        "recording": "completing branches for recordings",
    }
)
"""Meaning of each kind of tokens."""
