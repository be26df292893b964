"""The embedded model's task, files and launcher. Its quality is measured by its `study`, not here."""

from __future__ import annotations

import json
import math
import random
import re
from itertools import islice
from statistics import fmean
from typing import Any

import aiohttp
import pytest

from deploy.embedded import SERVED_MODEL_NAME, server, task
from deploy.embedded.task import (
    METHODS,
    ArithmeticOperation,
    Chain,
    OperationKind,
    Thought,
    chains,
    held_back,
    problems,
    think,
)
from proxy.commands.study import auroc, majority


@pytest.fixture(scope="module")
def thoughts() -> list[tuple[Chain, Thought]]:
    rng = random.Random(0)
    return [(chain, think(chain, rng)) for chain in islice(chains("train"), 1500)]


def _tokenizer() -> Any:
    tokenizers = pytest.importorskip(
        "tokenizers", reason="the extra `embedded` is not installed; `make test` installs it"
    )
    return tokenizers.Tokenizer.from_file(str(server.MODEL / "tokenizer.json"))


def test_a_problem_is_worded_as_in_the_readme_and_has_its_answer() -> None:
    assert task.EXAMPLE.question == (
        "Start with 7. 1) Add 5. 2) Multiply by 3. 3) Halve. 4) Square. 5) Negate. What is the result mod 13?"
    )
    assert task.EXAMPLE.answer == "1"  # 12, 10, 5, 12, 1


def test_halving_undoes_doubling() -> None:
    for value in range(task.MODULUS):
        assert ArithmeticOperation(OperationKind.HALVE)(value) * 2 % task.MODULUS == value


def test_held_back_problems_are_not_among_the_training_problems() -> None:
    trained = {problem.question for problem in islice(problems("train"), 3000)}
    held = held_back(500) + held_back(500, seed=1)
    assert not trained & {problem.question for problem in held}
    assert held_back(500) == held[:500]
    assert {problem.length for problem in held} == set(range(4, 17))


def test_thoughts_end_when_enough_passes_agree_or_after_the_last_pass(thoughts: list[tuple[Chain, Thought]]) -> None:
    for _, thought in thoughts:
        method, results = thought.method, thought.results
        counts = [results[: n + 1].count(result) for n, result in enumerate(results)]
        assert counts.index(max(counts)) == len(counts) - 1 or len(results) == method.passes
        assert max(counts) <= method.agreeing
        assert max(counts) == method.agreeing or len(results) == method.passes
        assert thought.text.startswith(f"{method.name}: ")
        assert thought.text.count("So ") == len(results)
        assert thought.text.rpartition("So ")[2].startswith(f"{thought.answer}.")


def test_checks_correct_slips(thoughts: list[tuple[Chain, Thought]]) -> None:
    thorough = [(chain.answer(), thought) for chain, thought in thoughts if thought.method.flaw is None]
    first = fmean(thought.results[0] == answer for answer, thought in thorough)
    last = fmean(thought.answer == answer for answer, thought in thorough)
    assert first < last - 0.1


def test_short_thoughts_are_wrong_more_often(thoughts: list[tuple[Chain, Thought]]) -> None:
    quick = [(chain, thought) for chain, thought in thoughts if thought.method is METHODS[0]]
    others = [(chain, thought) for chain, thought in thoughts if thought.method is not METHODS[0]]
    assert fmean(len(t.text) for _, t in quick) < fmean(len(t.text) for _, t in others) / 2
    right = [fmean(t.answer == chain.answer() for chain, t in part) for part in (quick, others)]
    assert right[0] < right[1] - 0.1


def test_a_vote_of_the_shortest_thoughts_is_worse_than_one_of_random_thoughts() -> None:
    rng = random.Random(0)
    scores: dict[str, list[float]] = {"random": [], "shortest": []}
    for chain in islice(chains("held_back"), 100):
        votes = [think(chain, rng) for _ in range(16)]
        by_length = sorted(votes, key=lambda thought: len(thought.text))
        for name, voters in (("random", votes[:4]), ("shortest", by_length[:4])):
            scores[name].append(majority([str(thought.answer) for thought in voters], str(chain.answer())))
    assert fmean(scores["shortest"]) < fmean(scores["random"]) - 0.05


def test_the_longest_prompt_thought_and_answer_fit_into_the_model(thoughts: list[tuple[Chain, Thought]]) -> None:
    config = json.loads((server.MODEL / "config.json").read_text())
    tokens = _tokenizer()
    longest = max(METHODS, key=lambda method: method.passes)
    text = max((t.text for c, t in thoughts if len(c.operations) == 16 and t.method is longest), key=len)
    assert 2 * len(tokens.encode(text).ids) < 2 * config["max_position_embeddings"] - 400


@pytest.mark.slow  # imports torch
def test_examples_without_thinking_answer_at_once() -> None:
    pytest.importorskip("torch", reason="the extra `embedded` is not installed; `make test` installs it")
    from deploy.embedded import tokenizer
    from deploy.embedded.examples import Examples

    tokens = _tokenizer()
    silent = 0
    for example in islice(Examples(tokens, 0, task.SLIP_RATE).up_to(8), 400):
        learned = [token for token, weight in zip(example.ids, example.weights, strict=True) if weight]
        given = [token for token, weight in zip(example.ids, example.weights, strict=True) if not weight]
        if not tokens.decode(given, skip_special_tokens=False).endswith(tokenizer.SILENCE):
            continue
        silent += 1
        reply = tokens.decode(learned, skip_special_tokens=False)
        assert re.fullmatch(r"The final answer is \\boxed\{\d+\}<\|im_end\|>", reply)
    assert silent


@pytest.mark.slow  # imports torch
def test_muon_makes_updates_orthogonal() -> None:
    torch = pytest.importorskip("torch", reason="the extra `embedded` is not installed; `make test` installs it")
    from deploy.embedded.muon import Muon, orthogonal

    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 4), (4, 6)):
        gradient = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(orthogonal(gradient))
        assert 0.6 < values.min() <= values.max() < 1.3
        ours, theirs = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(shape))
        ours.grad = theirs.grad = gradient
        Muon([ours], lr=0.1).step()
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0).step()
        assert torch.allclose(ours, theirs, atol=0.005)  # theirs is in bfloat16


@pytest.mark.vllm
async def test_without_thinking_the_model_answers_at_once(vllm: str) -> None:
    async with aiohttp.ClientSession() as http:
        for problem in held_back(5):
            body = {
                "model": SERVED_MODEL_NAME,
                "messages": [{"role": "user", "content": problem.question}],
                "chat_template_kwargs": {"enable_thinking": False},
                "max_tokens": 32,
                "seed": 0,
            }
            async with http.post(f"{vllm}/v1/chat/completions", json=body, raise_for_status=True) as response:
                [choice] = (await response.json())["choices"]
            assert choice["finish_reason"] == "stop"
            assert re.fullmatch(r"The final answer is \\boxed\{\d+\}", choice["message"]["content"])


def test_the_committed_model_is_complete_and_under_5_mib() -> None:
    files = {path.name: path.stat().st_size for path in server.MODEL.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= set(files)
    assert sum(files.values()) < 5 * 2**20
    config = json.loads((server.MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_on_a_cpu_without_avx2_the_server_exits_with_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "_has_avx2", lambda: False)
    assert server.main([]) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "AVX2" in stderr
    assert "--upstream" in stderr


def test_auroc_compares_within_groups_only() -> None:
    assert auroc([[(1, False), (2, True)], [(10, False), (20, True), (5, True)]]) == pytest.approx(2 / 3)
    assert auroc([[(1, False), (1, True)]]) == 0.5
    assert math.isnan(auroc([[(1, True)], [(2, False)]]))
