r"""How a branch is asked what it would answer now, by family of models.

The probe closes the thought the model's own way, leads into an answer, and lets the model write a few greedy tokens.
It never enters the branch's own context: the branch goes on from where it was.
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

# A closing brace that more text follows ends the answer; one that ends the message needs no stop. vLLM takes four.
_STOPS: Final = ("}\n", "}.", "}$", "} ")


class Family(StrEnum):
    """Models that write their thought the same way."""

    AUTO = "auto"  # told from the end of the prompt their chat template makes
    QWEN3 = "qwen3"  # <think> … </think>, opened by the template or the model; without one, as plain
    DEEPSEEK_R1 = "deepseek-r1"  # the same marks, and an answer under a heading
    GPT_OSS = "gpt-oss"  # harmony: the thought in a channel of its own
    PLAIN = "plain"  # no thought


@dataclass(frozen=True, slots=True)
class Template:
    """How models of one family are asked, and how their text divides into thought and reply."""

    name: str  # and version: recordings made under another one are not comparable
    opening: str  # begins a thought; empty if there are none
    ending: str  # ends it, as it stands in the model's text
    close: str  # what is appended to end it
    lead: str = LEAD  # begins the answer; ends with an open brace
    always: bool = False  # a thought is open until `ending`, whatever comes first
    special: bool = False  # the marks are special tokens, which a server leaves out of text unless told

    @property
    def longest_suffix(self) -> str:
        """The longest thing a probe may append."""
        return self.longest_closing + self.lead

    @property
    def longest_closing(self) -> str:
        """The longest thing that may be appended to end a thought."""
        return self.close or "\n\n"

    def thinking(self, prompt_tail: str, text: str) -> bool:
        """Whether a branch is inside its thought; the chat template may have opened it at `prompt_tail`."""
        if not self.opening or self.ending in text:
            return False
        return self.always or self.opening in text or prompt_tail.rstrip().endswith(self.opening)

    def reply_at(self, prompt_tail: str, text: str) -> int | None:
        """Where the reply begins in a branch's text; None while it is inside its thought, or may still open one."""
        if self.ending and self.ending in text:
            begun = text.rindex(self.ending) + len(self.ending)
            reply = text[begun:].lstrip("\n")
            return len(text) - len(reply) if reply else None
        if self.thinking(prompt_tail, text) or (self.opening and self.opening.startswith(text.strip())):
            return None
        return 0

    def closing(self, prompt_tail: str, text: str) -> str:
        """What ends the thought, so that the reply follows; nothing but a new paragraph where none is open."""
        if self.thinking(prompt_tail, text):
            return self.close
        return "" if text.endswith("\n\n") or not text else "\n\n"

    def suffix(self, prompt_tail: str, text: str) -> str:
        """What a probe appends to a branch whose own text so far is `text`."""
        return self.closing(prompt_tail, text) + self.lead

    def split(self, prompt_tail: str, text: str) -> tuple[str | None, str]:
        """A branch's text as its thought, None if it has none, and the reply that follows it."""
        thought, ended, reply = text.rpartition(self.ending) if self.ending else ("", "", text)
        if ended:
            return self._bare(thought), reply.strip("\n")
        return (self._bare(text), "") if text and self.thinking(prompt_tail, text) else (None, text)

    def answered(self, continuation: str) -> str | None:
        """The text in which a probe's answer stands; None if the model did not get to the closing brace."""
        text = self.lead + continuation
        return None if boxed(text) is None else text

    def led(self, continuation: str) -> str:
        """A reply that the lead began: the answer with its box closed."""
        content = (self.lead + continuation).strip()
        return content if boxed(content) is not None else content + "}"

    def _bare(self, thought: str) -> str:
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
    """The template of `family`, told by the prompt's end if that is AUTO, with what settings override."""
    if family is Family.AUTO:
        family = _told(prompt_tail)
    template = TEMPLATES[family]
    if close is None and lead is None:
        return template
    template = replace(template, close=template.close if close is None else close, lead=lead or template.lead)
    own = blake2b(f"{template.close}\0{template.lead}".encode(), digest_size=4).hexdigest()
    return replace(template, name=f"{template.name}+{own}")


def _told(prompt_tail: str) -> Family:
    if "<|start|>assistant" in prompt_tail:
        return Family.GPT_OSS
    return Family.DEEPSEEK_R1 if "<｜Assistant｜>" in prompt_tail else Family.QWEN3


def sampling() -> Mapping[str, Any]:
    """Greedy, so that asking twice would say the same."""
    return MappingProxyType({"temperature": 0.0, "stop": list(_STOPS), "include_stop_str_in_output": True})
