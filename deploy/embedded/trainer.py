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
from deploy.embedded.muon import Muon

MATRIX_RATE = 0.02
OTHER_RATE = 4e-3
WARM_UP = 0.02


@dataclass(frozen=True, slots=True)
class TrainingStage:
    """Part of the training, with fresh optimizers. All fractions but `share` are of the stage."""

    share: float  # of the training
    slip_rate: float  # of the solver
    peak: float  # factor on the learning rates
    cool_down: float  # fraction over which the learning rate falls
    curriculum: float  # fraction over which the maximum chain length grows

    def schedule(self, progress: float) -> float:
        """Return the factor on the learning rates: short warm-up, plateau, linear decay to 0.005 of the peak."""
        rise = min(1.0, (progress + 1e-3) / WARM_UP)
        fall = min(1.0, (1.0 - progress) / self.cool_down)
        return self.peak * max(0.005, min(rise, fall))

    def longest_chain(self, progress: float) -> int:
        """Return the maximum chain length. Short chains teach arithmetic, long ones keeping track."""
        shortest, longest = task.LENGTHS
        grown = progress / self.curriculum if self.curriculum else 1.0
        return min(longest, shortest + round((longest - shortest) * grown))


# After the first stage the model is right less often than the solver it imitates. In the second the solver slips less.
STAGES = (
    TrainingStage(0.76, slip_rate=0.075, peak=1.0, cool_down=0.6, curriculum=0.3),
    TrainingStage(0.24, slip_rate=task.SLIP_RATE, peak=0.5, cool_down=1.0, curriculum=0.0),
)


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
    """Optimizers of a model for one stage, with a shared learning-rate schedule."""

    def __init__(self, model: Qwen3ForCausalLM, stage: TrainingStage) -> None:
        self._model = model
        self._stage = stage
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=MATRIX_RATE),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._rates = (MATRIX_RATE, OTHER_RATE)

    def step(self, batch: TrainingBatch, progress: float) -> float:
        """Make one optimizer step at `progress` of the stage, from 0 to 1; return the weighted mean loss."""
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * self._stage.schedule(progress)
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


@dataclass(slots=True)
class Budget:
    """Length of the training: a number of steps, or of minutes if `minutes` is set. It counts the steps."""

    steps: int
    minutes: float | None
    started: float
    step: int = 0

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def progress(self) -> float:
        """Return the fraction of the training that is done; 1 or more at the end."""
        return self.step / self.steps if self.minutes is None else self.seconds / (60 * self.minutes)


def train(budget: Budget, seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train a tokenizer and a model from scratch, and print the loss every 50 steps."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    fast = tokenizer.build(seed)
    model = Qwen3ForCausalLM(configuration(fast))  # type: ignore[no-untyped-call, unused-ignore]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(fast)} ids", flush=True)
    begin = 0.0
    for number, stage in enumerate(STAGES):
        _run(stage, begin, budget, model, fast, seed + number)
        begin += stage.share
    return model, fast


def _run(
    stage: TrainingStage,
    begin: float,
    budget: Budget,
    model: Qwen3ForCausalLM,
    fast: PreTrainedTokenizerFast,
    seed: int,
) -> None:
    """Run a stage that begins at the fraction `begin` of the training."""
    trainer = Trainer(model, stage)
    mean = math.nan
    for batch, length in _stream(stage, begin, budget, fast, seed):
        loss = trainer.step(batch, (budget.progress() - begin) / stage.share)
        mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
        if budget.step % 50 == 0:
            done = f"{budget.progress():4.0%}  {budget.seconds:4.0f} s"
            print(f"step {budget.step:5d}  {done}  length {length:2d}  loss {mean:.4f}", flush=True)
        budget.step += 1


def _stream(
    stage: TrainingStage, begin: float, budget: Budget, fast: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[TrainingBatch, int]]:
    """Yield batches and their maximum chain length until the stage is over."""
    rng = random.Random(f"batches/{seed}")
    examples = Examples(fast.backend_tokenizer, seed, stage.slip_rate)
    while True:
        length = stage.longest_chain((budget.progress() - begin) / stage.share)
        for batch in batches(examples.up_to(length), fast.pad_token_id, rng):
            if budget.progress() >= min(1.0, begin + stage.share):
                return
            yield batch, length


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
