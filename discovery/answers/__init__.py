r"""Text → label: which answer a text gives, and which answers are the same.

`read` finds the answer a text ends up giving, in the way its `Kind` says; `canonical` brings what is written there to a
form by which it is compared; `Labels` numbers the answers of an episode, asking a `Judge` where forms alone cannot
tell. Replay regrades recordings with this, the proxy reads probes and replies with it, so neither can drift.
"""

from discovery.answers.forms import Form, Sort, canonical
from discovery.answers.judge import Judge
from discovery.answers.kinds import AUTO, Kind, Way, parse_kind
from discovery.answers.labels import Labels
from discovery.answers.reading import PATTERN_S, Answer, boxed, read
from discovery.answers.redaction import is_veiled, veiled
from discovery.answers.stated import VOTES_ALONE

__all__ = [
    "AUTO",
    "PATTERN_S",
    "VOTES_ALONE",
    "Answer",
    "Form",
    "Judge",
    "Kind",
    "Labels",
    "Sort",
    "Way",
    "boxed",
    "canonical",
    "is_veiled",
    "parse_kind",
    "read",
    "veiled",
]
