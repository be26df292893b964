r"""Answers: find the answer a text gives, and decide which answers are equal.

`read_answer` extracts the final answer of a text by the method of its `AnswerKind`. `canonical` brings an answer to the
form by which it is compared. `Labels` numbers the answers of an episode and asks a `Judge` where forms alone cannot
decide. Replay grades recordings and the proxy reads probes and replies with the same code, so they cannot disagree.
Imported by everything in `discovery` and `proxy`.
"""

from discovery.answers.extraction import PATTERN_S, Answer, boxed, canonical_answer, read_answer
from discovery.answers.forms import CanonicalForm, FormType, canonical
from discovery.answers.judge import Judge
from discovery.answers.kinds import AUTO, AnswerKind, ExtractionMethod, parse_kind
from discovery.answers.labels import Labels
from discovery.answers.overlap import medoid
from discovery.answers.redaction import RedactedLabels, are_same_redacted, is_redacted, redacted
from discovery.answers.stated_answers import VOTABLE_TYPES

__all__ = [
    "AUTO",
    "PATTERN_S",
    "VOTABLE_TYPES",
    "Answer",
    "AnswerKind",
    "CanonicalForm",
    "ExtractionMethod",
    "FormType",
    "Judge",
    "Labels",
    "RedactedLabels",
    "are_same_redacted",
    "boxed",
    "canonical",
    "canonical_answer",
    "is_redacted",
    "medoid",
    "parse_kind",
    "read_answer",
    "redacted",
]
