"""The model's tokenizer: byte-level BPE of a few hundred ids, with Qwen3's control tokens and chat format."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deploy.embedded import task

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK, END_THINK = "<think>", "</think>"

# Text that follows a finished thought. The proxy appends it to an unfinished thought to probe for an answer.
ANSWER = "The final answer is \\boxed{"
CONCLUSION = f"{END_THINK}\n\n{ANSWER}"
PROBE = f"\n{CONCLUSION}"
# End of a prompt with `enable_thinking=false`, as the chat template writes it.
SILENCE = f"{THINK}\n\n{END_THINK}\n\n"

VOCABULARY = 448

# A word, a number (with a bracket if it numbers a step) or a run of punctuation, each with the space before it, or a
# single line break. Line breaks are never merged: a truncated thought and the probe after it get the same ids whether
# they are tokenized together or separately.
_PIECES = r" ?[A-Za-z]+| ?[0-9]+\)?| ?[^\sA-Za-z0-9]+|\s"

# Like Qwen3's template: the thought of an assistant turn is removed once another turn follows. With
# `enable_thinking=false` the prompt ends in an empty thought.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and not loop.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def build(seed: int = 0, sample: int = 4000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `sample` examples of the task; the same seed gives the same ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 5,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, sample), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END)])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in (THINK, END_THINK)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _texts(seed: int, sample: int) -> Iterator[str]:
    rng = random.Random(seed)
    for chain in islice(task.chains("train", seed), sample):
        thought = task.think(chain, rng)
        text = f"{thought.text}\n\nThe final answer is \\boxed{{{thought.answer}}}"
        yield f"user\n{chain.question()}assistant\nsystem\n{text}"
