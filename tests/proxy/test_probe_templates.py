"""Probe suffixes and thought marks of each family of models. Prompts end as chat templates make them."""

from __future__ import annotations

import pytest

from discovery.answers import canonical_answer
from proxy.errors import SettingsError
from proxy.probe_templates import LEAD, TEMPLATES, Family, template_for
from proxy.settings import load
from tests.fakes import Chain
from tests.proxy.conftest import SMALL, Proxy

QWEN3_TAIL = "<|im_start|>assistant\n"
QWEN3_OFF_TAIL = "<|im_start|>assistant\n<think>\n\n</think>\n\n"  # enable_thinking=False
QWEN3_THINKING_TAIL = "<|im_start|>assistant\n<think>\n"  # the models that only think
R1_TAIL = "?<｜Assistant｜><think>\n"
HARMONY_TAIL = "<|end|><|start|>assistant"
LLAMA_TAIL = "<|start_header_id|>assistant<|end_header_id|>\n\n"

FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    ("tail", "text", "suffix"),
    [
        pytest.param(QWEN3_TAIL, "<think>\nFirst", f"\n</think>\n\n{LEAD}", id="qwen3 thinks"),
        pytest.param(QWEN3_TAIL, "<think>\nFirst\n</think>\n\nSo", f"\n\n{LEAD}", id="qwen3 has thought"),
        pytest.param(QWEN3_OFF_TAIL, "Let us see", f"\n\n{LEAD}", id="qwen3 told not to think"),
        pytest.param(QWEN3_THINKING_TAIL, "First", f"\n</think>\n\n{LEAD}", id="qwen3 that only thinks"),
        pytest.param(R1_TAIL, "First", "\n</think>\n\n**Final Answer**\n\\boxed{", id="deepseek thinks"),
        pytest.param(R1_TAIL, "a</think>\n\n", "**Final Answer**\n\\boxed{", id="deepseek has thought"),
        pytest.param(HARMONY_TAIL, f"{ANALYSIS}First", f"{FINAL}{LEAD}", id="gpt-oss thinks"),
        pytest.param(HARMONY_TAIL, "", f"{FINAL}{LEAD}", id="gpt-oss has not begun"),
        pytest.param(HARMONY_TAIL, f"{ANALYSIS}a{FINAL}So", f"\n\n{LEAD}", id="gpt-oss has thought"),
        pytest.param(LLAMA_TAIL, "Let us see", f"\n\n{LEAD}", id="plain"),
    ],
)
def test_the_family_is_detected_from_the_prompt_and_gets_its_own_suffix(tail: str, text: str, suffix: str) -> None:
    template = template_for(Family.AUTO, tail)
    assert template.suffix(tail, text) == suffix
    assert len(suffix) <= len(template.longest_suffix)


@pytest.mark.parametrize(
    ("tail", "text", "thought", "reply"),
    [
        (QWEN3_TAIL, "<think>\nFirst\n</think>\n\nSo 7.", "First", "So 7."),
        (QWEN3_TAIL, "<think>\nFirst", "First", ""),
        (QWEN3_TAIL, "No thought.", None, "No thought."),
        (QWEN3_OFF_TAIL, "Plainly 7.", None, "Plainly 7."),
        (R1_TAIL, "First\n</think>\n\nSo 7.", "First", "So 7."),
        (R1_TAIL, "First", "First", ""),
        (HARMONY_TAIL, f"{ANALYSIS}First{FINAL}So 7.", "First", "So 7."),
        (HARMONY_TAIL, f"{ANALYSIS}First", "First", ""),
        (LLAMA_TAIL, "So 7.", None, "So 7."),
    ],
)
def test_text_splits_into_thought_and_reply(tail: str, text: str, thought: str | None, reply: str) -> None:
    assert template_for(Family.AUTO, tail).split(tail, text) == (thought, reply)


def test_a_plain_model_never_has_a_thought() -> None:
    template = TEMPLATES[Family.PLAIN]
    assert not template.thinking("", "<think> is a tag")
    assert template.split("", "<think> is a tag</think>") == (None, "<think> is a tag</think>")


@pytest.mark.parametrize("family", [family for family in Family if family is not Family.AUTO])
@pytest.mark.parametrize(
    ("continuation", "answer"),
    [
        ("7}", "7"),
        (r"\frac{1}{2}}.", "1/2"),
        ("7", None),
        ("", None),
        (r"\text{no idea", None),
        ("72", None),
        ("7} or {8}", "7"),
    ],
)
def test_a_probe_is_read_to_the_closing_brace(family: Family, continuation: str, answer: str | None) -> None:
    text = TEMPLATES[family].answered(continuation)
    assert (None if text is None else canonical_answer(text)) == answer


def test_an_overridden_template_has_its_own_name() -> None:
    plain = template_for(Family.QWEN3, "")
    other = template_for(Family.QWEN3, "", lead="**Answer:** \\boxed{")
    closed = template_for(Family.QWEN3, "", close="\nTime is up.\n</think>\n\n")
    assert other.suffix("", "<think>a") == "\n</think>\n\n**Answer:** \\boxed{"
    assert closed.suffix("", "<think>a") == f"\nTime is up.\n</think>\n\n{LEAD}"
    assert len({plain.name, other.name, closed.name}) == 3
    assert other.name == template_for(Family.QWEN3, "", lead="**Answer:** \\boxed{").name


def test_a_lead_without_a_brace_is_refused() -> None:
    with pytest.raises(SettingsError, match="probe_lead"):
        load(upstream="http://127.0.0.1:1", probe_lead="The answer is", **SMALL)


def test_harmony_marks_are_requested_as_special_tokens() -> None:
    assert TEMPLATES[Family.GPT_OSS].special  # servers omit special tokens from text unless asked


async def test_a_probe_never_enters_its_branch(proxy: Proxy) -> None:
    """Every context that is continued holds only what the branch itself wrote."""
    await proxy.ask("1", tts={"controller": "parallel_probe"})
    texts = {"".join(map(chr, p)) for r in proxy.backend.requests for p in _prompts(r) if r.get("temperature") != 0}
    assert all("The final answer is" not in text for text in texts)
    assert len(texts) > 64


def _prompts(request: dict[str, object]) -> list[list[int]]:
    prompt = request["prompt"]
    assert isinstance(prompt, list)
    return prompt if isinstance(prompt[0], list) else [prompt]


async def test_the_reply_names_its_probe_template(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("<think>a</think>\n\n\\boxed{7}", ("7",))]
    _, _, reply = await proxy.ask("0")
    assert reply["tts"]["probe_template"] == TEMPLATES[Family.QWEN3].name
