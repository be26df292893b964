"""Training of the embedded model: configuration, optimizers, learning-rate schedule, training loop and output."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from deploy.embedded import task, tokenizer
from deploy.embedded.examples import Examples, TrainingBatch, batches

# The maximum chain length grows over this share of training: short chains teach arithmetic, long ones keeping track.
CURRICULUM = 0.3

MATRIX_RATE = 0.02
OTHER_RATE = 4e-3
WARM_UP = 0.02
COOL_DOWN = 0.6


def configuration(fast: PreTrainedTokenizerFast) -> Qwen3Config:
    """Return the configuration of the model, with the vocabulary of the tokenizer."""
    return Qwen3Config(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        attn_implementation="sdpa",  # type: ignore[call-arg, unused-ignore]
        dtype="float32",
    )


class Trainer:
    """Optimizers of a model, with a shared learning-rate schedule."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self._model = model
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._rates = (MATRIX_RATE, OTHER_RATE)

    def step(self, batch: TrainingBatch, progress: float) -> float:
        """Make one optimizer step at `progress` from 0 to 1; return the weighted mean loss."""
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(progress)
        weights = batch.weights[:, 1:]
        learned = weights > 0
        hidden = self._model.model(input_ids=batch.ids).last_hidden_state
        logits = self._model.lm_head(hidden[:, :-1][learned])
        losses = nn.functional.cross_entropy(logits, batch.ids[:, 1:][learned], reduction="none")
        loss = (losses * weights[learned]).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.item())


def schedule(progress: float) -> float:
    """Return the learning rate as a fraction of its peak: short warm-up, plateau, linear decay to 0.005."""
    rise = min(1.0, (progress + 1e-3) / WARM_UP)
    fall = min(1.0, (1.0 - progress) / COOL_DOWN)
    return max(0.005, min(rise, fall))


@dataclass(slots=True)
class Budget:
    """Length of the training: a number of steps, or of minutes if `minutes` is set."""

    steps: int
    minutes: float | None
    started: float

    def progress(self, step: int) -> float:
        """Return the fraction of the training that is done before `step`; 1 or more at the end."""
        if self.minutes is None:
            return step / self.steps
        return (time.monotonic() - self.started) / (60 * self.minutes)


def train(budget: Budget, seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train a tokenizer and a model from scratch, and print the loss every 50 steps."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    fast = tokenizer.build(seed)
    model = Qwen3ForCausalLM(configuration(fast))  # type: ignore[no-untyped-call, unused-ignore]
    trainer = Trainer(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(fast)} ids", flush=True)
    mean = math.nan
    for step, (batch, length, progress) in enumerate(_stream(budget, fast, seed)):
        loss = trainer.step(batch, progress)
        mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
        if step % 50 == 0:
            seconds = time.monotonic() - budget.started
            print(f"step {step:5d}  {progress:4.0%}  {seconds:4.0f} s  length {length:2d}  loss {mean:.4f}", flush=True)
    return model, fast


def _stream(budget: Budget, fast: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[TrainingBatch, int, float]]:
    """Yield (batch, maximum chain length, progress) until the training budget is used up."""
    rng = random.Random(f"batches/{seed}")
    examples = Examples(fast, seed)
    step = 0
    progress = 0.0
    shortest, longest = task.LENGTHS
    while True:
        length = min(longest, shortest + round((longest - shortest) * progress / CURRICULUM))
        for batch in batches(examples.up_to(length), fast.pad_token_id, rng):
            progress = budget.progress(step)
            if progress >= 1.0:
                return
            yield batch, length, progress
            step += 1


def write(model: Qwen3ForCausalLM, fast: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as a Hugging Face folder. The old folder is replaced only when the new one is complete."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model.save_pretrained(fresh)
    fast.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
