"""Training examples of the task: token ids and a loss weight for each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from deploy.embedded import task, tokenizer

BATCH_TOKENS = 4096

# Probes are meaningful only if the model was trained on truncated thoughts. The few ids of an answer weigh more than
# those of a thought: otherwise the model learns too slowly to answer from a truncated thought.
CUT_RATE = 1 / 3
ANSWER_WEIGHT = 4.0
# Shares of examples with thinking switched off, with a system message, and with an earlier turn.
SILENT_RATE = 0.02
SYSTEM_RATE = 0.05
EARLIER_TURN_RATE = 0.05


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and their loss weights. Ids that the model does not generate have weight 0."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Padded examples, one per row: ids and weights of shape (examples, longest)."""

    ids: Tensor
    weights: Tensor


class Examples:
    """Endless stream of training examples, determined by a seed and the solver's slip rate."""

    def __init__(self, backend: Tokenizer, seed: int, slip_rate: float) -> None:
        self._backend = backend
        self._slip_rate = slip_rate
        self._rng = random.Random(f"examples/{seed}")
        self._seed = seed
        self._probe = self._ids(tokenizer.PROBE)
        self._silence = self._ids(tokenizer.SILENCE)

    def up_to(self, length: int) -> Iterator[Example]:
        """Yield examples of chains of at most `length` operations."""
        for chain in task.chains("train", self._rng.getrandbits(64), (task.LENGTHS[0], length)):
            yield self._example(chain)

    def _example(self, chain: task.Chain) -> Example:
        thought = task.think(chain, self._rng, self._slip_rate)
        prompt = self._prompt(chain)
        reply = f"{thought.answer}}}{tokenizer.END}"
        if self._rng.random() < SILENT_RATE:
            spoken = self._ids(f"{tokenizer.ANSWER}{reply}")
            return Example(prompt + self._silence + spoken, [0.0] * len(prompt + self._silence) + [1.0] * len(spoken))
        thinking = self._ids(f"{tokenizer.THINK}\n{thought.text}")
        if self._rng.random() < CUT_RATE:
            cut = self._rng.randrange(2, len(thinking) + 1)
            return _example(prompt, thinking[:cut], self._probe, self._ids(reply))
        return _example(prompt, thinking + self._ids(tokenizer.CONCLUSION), [], self._ids(reply))

    def _prompt(self, chain: task.Chain) -> list[int]:
        """Return the ids of a prompt for `chain`, sometimes with a system message or an earlier turn."""
        messages = [{"role": "user", "content": chain.question()}]
        if self._rng.random() < EARLIER_TURN_RATE:
            earlier = next(task.problems("train", self._rng.getrandbits(64), (4, 8)))
            earlier_reply = f"The final answer is \\boxed{{{earlier.answer}}}"
            messages[:0] = [
                {"role": "user", "content": earlier.question},
                {"role": "assistant", "content": earlier_reply},
            ]
        if self._rng.random() < SYSTEM_RATE:
            messages.insert(0, {"role": "system", "content": self._random_system_message()})
        text = "".join(f"{tokenizer.START}{m['role']}\n{m['content']}{tokenizer.END}\n" for m in messages)
        return self._ids(f"{text}{tokenizer.START}assistant\n")

    def _random_system_message(self) -> str:
        """Return a system message of random words, so that the model learns to ignore system messages."""
        letters = "abcdefghijklmnopqrstuvwxyz"
        count = self._rng.randint(2, 8)
        syllables = ("".join(self._rng.choices(letters, k=self._rng.randint(1, 7))) for _ in range(count))
        return " ".join(syllables).capitalize() + "."

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def _example(prompt: list[int], thinking: list[int], given: list[int], answer: list[int]) -> Example:
    """Build an example from a prompt, a thought, the suffix that a probe appends, and the answer."""
    weights = [0.0] * len(prompt) + [1.0] * len(thinking) + [0.0] * len(given) + [ANSWER_WEIGHT] * len(answer)
    return Example(prompt + thinking + given + answer, weights)


def batches(examples: Iterator[Example], pad: int, rng: random.Random, pool: int = 256) -> Iterator[TrainingBatch]:
    """Yield batches of about BATCH_TOKENS tokens. Examples of one pool are grouped by length and padded at the end."""
    groups: list[list[Example]] = [[]]
    for example in sorted((next(examples) for _ in range(pool)), key=lambda example: len(example.ids)):
        if (len(groups[-1]) + 1) * len(example.ids) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    for group in groups:
        width = max(len(example.ids) for example in group)
        ids = [example.ids + [pad] * (width - len(example.ids)) for example in group]
        weights = [example.weights + [0.0] * (width - len(example.weights)) for example in group]
        yield TrainingBatch(torch.tensor(ids), torch.tensor(weights))
