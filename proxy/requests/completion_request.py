"""Request body of POST /v1/completions: one or several prompts, each a text or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import BeforeValidator, Field, PrivateAttr

from discovery.store import MAX_PROMPTS
from proxy.requests import field_table
from proxy.requests.generation_request import GenerationRequest, PassThroughReason

MAX_PROMPT_IDS: Final = 2**20
"""Maximum number of token ids in a prompt, and in all prompts of a request that a controller serves."""


def _bounded_ids(prompt: object) -> object:
    """Return `prompt` unchanged. Raises ValueError if it is a single prompt of too many token ids."""
    ids = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if isinstance(ids, list) and len(ids) > MAX_PROMPT_IDS:
        raise ValueError(f"at most {MAX_PROMPT_IDS} token ids are accepted, not {len(ids)}")
    return prompt


class CompletionRequest(GenerationRequest):
    """A request to continue a text or a list of token ids, or several of either."""

    prompt_field: ClassVar[str] = "prompt"
    unsupported_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.TEXT

    prompt: Annotated[Any, BeforeValidator(_bounded_ids)] = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    _checked_prompts: Sequence[str | list[int]] | None = PrivateAttr(None)

    @property
    def branch_limit(self) -> int | None:
        return self.max_tokens

    @property
    def prompt_text(self) -> str | None:
        prompt = self._prompts[0] if self._prompts else None
        return prompt if isinstance(prompt, str) else None

    @property
    def prompt_ids(self) -> Sequence[int] | None:
        prompt = self._prompts[0] if self._prompts else None
        return prompt if isinstance(prompt, list) else None

    def split_by_prompt(self) -> Sequence[Self]:
        prompts = self._prompts
        return [self] if len(prompts) < 2 else [self._with_checked_prompt(prompt) for prompt in prompts]

    def _with_checked_prompt(self, prompt: str | list[int]) -> Self:
        """Return a copy with a single prompt whose token ids have been checked."""
        part = self.model_copy(update={"prompt": prompt})
        part._checked_prompts = [prompt]
        return part

    @property
    def _prompts(self) -> Sequence[str | list[int]]:
        """The prompts, or none if no controller can serve them. The check is cached: there may be a million ids."""
        if self._checked_prompts is None:
            self._checked_prompts = _servable_prompts(self.prompt)
        return self._checked_prompts

    def pass_through_reason(self) -> PassThroughReason | None:
        reason = super().pass_through_reason()
        if reason is None and self.max_tokens == 0:
            return PassThroughReason("max_tokens", "max_tokens")
        if reason is None and not self._prompts:
            return PassThroughReason(self.prompt_field, self.prompt_field)
        return reason


def _servable_prompts(value: Any) -> Sequence[str | list[int]]:
    """Return the prompts in a `prompt` field.

    The result is empty if a prompt is empty or is neither text nor token ids, or if there are too many prompts or ids.
    """
    has_several = isinstance(value, list) and value and isinstance(value[0], str | list)
    prompts = value if has_several else [value]
    if len(prompts) > MAX_PROMPTS or sum(len(ids) for ids in prompts if isinstance(ids, list)) > MAX_PROMPT_IDS:
        return []
    return prompts if all(map(_is_prompt, prompts)) else []


def _is_prompt(value: object) -> bool:
    if isinstance(value, list):
        return {*map(type, value)} == {int} and min(value) >= 0
    return isinstance(value, str) and bool(value)
