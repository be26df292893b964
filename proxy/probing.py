r"""How a branch is asked what it would answer now.

The probe closes the thought the model's own way, leads into an answer, and lets the model write a few greedy tokens.
It never enters the branch's own context: the branch goes on from where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from discovery.answers import Kind, boxed, read

TEMPLATE: Final = "close-think+boxed/1"
"""Name and version of the way probes are asked: recordings made under another one are not comparable."""

THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"
LEAD: Final = "The final answer is \\boxed{"

LONGEST_CLOSING: Final = f"\n{THINK_CLOSE}\n\n"
LONGEST_SUFFIX: Final = LONGEST_CLOSING + LEAD

# A closing brace that more text follows ends the answer; one that ends the message needs no stop. vLLM takes four.
_STOPS: Final = ("}\n", "}.", "}$", "} ")


def thinking(prompt_tail: str, text: str) -> bool:
    """Whether a branch is inside its thought, which the template may have opened at `prompt_tail`, the prompt's end."""
    opened = THINK_OPEN in text or prompt_tail.rstrip().endswith(THINK_OPEN)
    return opened and THINK_CLOSE not in text


def closing(prompt_tail: str, text: str) -> str:
    """What ends the thought, so that the reply follows; nothing but a new paragraph where none is open."""
    if thinking(prompt_tail, text):
        return LONGEST_CLOSING
    return "" if text.endswith("\n\n") or not text else "\n\n"


def suffix(prompt_tail: str, text: str) -> str:
    """What a probe appends to a branch whose own text so far is `text`."""
    return closing(prompt_tail, text) + LEAD


def sampling() -> Mapping[str, Any]:
    """Greedy, so that asking twice would say the same."""
    return MappingProxyType({"temperature": 0.0, "stop": list(_STOPS), "include_stop_str_in_output": True})


def read_probe(continuation: str, kind: Kind) -> str | None:
    """The canonical answer in what the model wrote after LEAD, or None."""
    return read(LEAD + continuation, kind)


def led(continuation: str) -> str:
    """A reply that LEAD began: the answer with its box closed."""
    content = (LEAD + continuation).strip()
    return content if boxed(content) is not None else content + "}"
