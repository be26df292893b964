"""The embedded model's task, files and launcher. Its quality is measured by its `study`, not here."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from deploy.embedded import server, task
from deploy.embedded.task import ArithmeticOperation, Chain, OperationKind, held_back, problems


def test_a_problem_is_worded_as_in_the_readme_and_has_its_answer() -> None:
    steps = (
        ArithmeticOperation(OperationKind.ADD, 5),
        ArithmeticOperation(OperationKind.MULTIPLY, 3),
        ArithmeticOperation(OperationKind.HALVE),
        ArithmeticOperation(OperationKind.SQUARE),
        ArithmeticOperation(OperationKind.NEGATE),
    )
    chain = Chain(7, steps)
    assert chain.question() == (
        "Start with 7. 1) Add 5. 2) Multiply by 3. 3) Halve. 4) Square. 5) Negate. What is the result mod 13?"
    )
    assert chain.answer() == 1  # 12, 10, 5, 12, 1


def test_halving_undoes_doubling() -> None:
    for value in range(task.MODULUS):
        assert ArithmeticOperation(OperationKind.HALVE)(value) * 2 % task.MODULUS == value


def test_held_back_problems_are_not_among_the_training_problems() -> None:
    trained = {problem.question for problem in islice(problems("train"), 3000)}
    held = held_back(500) + held_back(500, seed=1)
    assert not trained & {problem.question for problem in held}
    assert held_back(500) == held[:500]
    assert {problem.length for problem in held} == set(range(4, 17))


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
