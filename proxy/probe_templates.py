r"""Texts of probes for each model family. A probe makes a branch give its current answer.

A probe closes the thought in the model's format, leads into an answer, and lets the model generate a few greedy tokens.
It is not added to the branch's context, so the branch continues from where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final

from discovery.answers import boxed

LEAD: Final = "The final answer is \\boxed{"
"""Text that leads into the answer, in most families."""

# A closing brace followed by more text ends the answer. At the end of a message no stop string is needed.
# vLLM accepts at most four.
_STOPS: Final = ("}\n", "}.", "}$", "} ")


class Family(StrEnum):
    """A family of models that mark their thoughts in the same way."""

    AUTO = "auto"  # recognised by the end of the prompt, which the chat template writes
    QWEN3 = "qwen3"  # <think> … </think>, opened by the template or by the model; treated as plain if neither does
    DEEPSEEK_R1 = "deepseek-r1"  # <think> … </think>, and an answer under a heading
    GPT_OSS = "gpt-oss"  # harmony format: the thought has its own channel
    PLAIN = "plain"  # no thought


@dataclass(frozen=True, slots=True)
class Template:
    """How to probe models of one family, and how to split their text into thought and reply."""

    name: str  # with its version; recordings made with different templates are not comparable
    opening: str  # mark that begins a thought; empty if the models have no thoughts
    ending: str  # mark that ends a thought, as it appears in the model's text
    close: str  # text that a probe appends to end a thought
    lead: str = LEAD  # text that begins the answer; it ends with an opening brace
    always: bool = False  # a thought is open until `ending`, even without `opening`
    special: bool = False  # the marks are special tokens, which servers omit from text unless asked

    @property
    def longest_suffix(self) -> str:
        """The longest suffix that a probe may append."""
        return self.longest_closing + self.lead

    @property
    def longest_closing(self) -> str:
        """The longest text that may be appended to end a thought."""
        return self.close or "\n\n"

    def thinking(self, prompt_tail: str, text: str) -> bool:
        """Return whether a branch is inside its thought. The chat template may have opened it in the prompt's tail."""
        if not self.opening or self.ending in text:
            return False
        return self.always or self.opening in text or prompt_tail.rstrip().endswith(self.opening)

    def reply_at(self, prompt_tail: str, text: str) -> int | None:
        """Return the index at which the reply begins. None if the branch is in its thought or may still open one."""
        if self.ending and self.ending in text:
            thought_end = text.rindex(self.ending) + len(self.ending)
            reply = text[thought_end:].lstrip("\n")
            return len(text) - len(reply) if reply else None
        if self.thinking(prompt_tail, text) or (self.opening and self.opening.startswith(text.strip())):
            return None
        return 0

    def closing(self, prompt_tail: str, text: str) -> str:
        """Return the text that ends an open thought. If none is open, return a paragraph break or nothing."""
        if self.thinking(prompt_tail, text):
            return self.close
        return "" if text.endswith("\n\n") or not text else "\n\n"

    def suffix(self, prompt_tail: str, text: str) -> str:
        """Return the text that a probe appends to a branch with this `text`."""
        return self.closing(prompt_tail, text) + self.lead

    def split(self, prompt_tail: str, text: str) -> tuple[str | None, str]:
        """Split a branch's text into its thought, or None, and its reply."""
        thought, ending, reply = text.rpartition(self.ending) if self.ending else ("", "", text)
        if ending:
            return self._without_marks(thought), reply.strip("\n")
        return (self._without_marks(text), "") if text and self.thinking(prompt_tail, text) else (None, text)

    def answered(self, continuation: str) -> str | None:
        """Return the lead and the probe's continuation, or None if the model did not reach the closing brace."""
        text = self.lead + continuation
        return None if boxed(text) is None else text

    def led(self, continuation: str) -> str:
        """Return a reply made of the lead and the answer, with its box closed."""
        content = (self.lead + continuation).strip()
        return content if boxed(content) is not None else content + "}"

    def _without_marks(self, thought: str) -> str:
        if self.special:
            thought = thought.partition("<|end|>")[0]
        return thought.replace(self.opening, "", 1).strip("\n")


_THINK_CLOSE: Final = "\n</think>\n\n"

TEMPLATES: Final[Mapping[Family, Template]] = MappingProxyType(
    {
        Family.QWEN3: Template("qwen3/2", "<think>", "</think>", _THINK_CLOSE),
        Family.DEEPSEEK_R1: Template(
            "deepseek-r1/1", "<think>", "</think>", _THINK_CLOSE, "**Final Answer**\n\\boxed{"
        ),
        Family.GPT_OSS: Template(
            "gpt-oss/1",
            "<|channel|>analysis<|message|>",
            "<|channel|>final<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
            always=True,
            special=True,
        ),
        Family.PLAIN: Template("plain/1", "", "", ""),
    }
)


def template_for(family: Family, prompt_tail: str, *, close: str | None = None, lead: str | None = None) -> Template:
    """Return the template of `family`, with `close` and `lead` replaced if given.

    AUTO is resolved by the end of the prompt. A template with replaced texts gets its own name.
    """
    if family is Family.AUTO:
        family = _detect_family(prompt_tail)
    template = TEMPLATES[family]
    if close is None and lead is None:
        return template
    template = replace(template, close=template.close if close is None else close, lead=lead or template.lead)
    digest = blake2b(f"{template.close}\0{template.lead}".encode(), digest_size=4).hexdigest()
    return replace(template, name=f"{template.name}+{digest}")


def _detect_family(prompt_tail: str) -> Family:
    if "<|start|>assistant" in prompt_tail:
        return Family.GPT_OSS
    return Family.DEEPSEEK_R1 if "<｜Assistant｜>" in prompt_tail else Family.QWEN3


def sampling() -> Mapping[str, Any]:
    """Return the sampling parameters of a probe. Probes are greedy, so that equal probes give equal answers."""
    return MappingProxyType({"temperature": 0.0, "stop": list(_STOPS), "include_stop_str_in_output": True})
