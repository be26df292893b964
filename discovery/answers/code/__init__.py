"""Code answers: functions in replies, the examples of a request to call them with, and the vote on their behaviour.

Nothing here runs code: examples are read as literals only. Imported by `proxy`.
"""

from discovery.answers.code.behaviour import Behaviour, finalists
from discovery.answers.code.blocks import code_blocks
from discovery.answers.code.examples import MAX_EXAMPLES, CodeExample, CodeTask, as_arguments, read_examples

__all__ = [
    "MAX_EXAMPLES",
    "Behaviour",
    "CodeExample",
    "CodeTask",
    "as_arguments",
    "code_blocks",
    "finalists",
    "read_examples",
]
