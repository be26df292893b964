"""Figures of live requests: answers are read and billed as clients see them, and predictions hold."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.embedded.task import held_back
from proxy.commands.loop.live_requests import ask_all, mean_interval, predict, right_of, tokens_of
from proxy.server import running
from proxy.settings import load
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL


def test_a_mean_has_a_normal_interval() -> None:
    values = np.array([0.0, 100.0] * 50)
    interval = mean_interval(values)
    assert interval.mean == 50
    assert interval.high - interval.mean == pytest.approx(1.959964 * values.std(ddof=1) / 10)
    assert interval.contains(50)
    assert not interval.contains(70)


def test_new_questions_are_inside_their_prediction_about_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(400):
        recorded, fresh = rng.beta(1, 1, 300), rng.beta(1, 1, 200)  # each question's probability of a right answer
        episodes = (rng.random((20, 300)) < recorded).astype(float)
        inside += predict(episodes, 200).contains(float((rng.random(200) < fresh).mean()))
    assert 0.925 <= inside / 400 <= 0.975


def test_six_predictions_hold_together_at_least_95_times_in_100() -> None:
    rng = np.random.default_rng(8)
    together = 0
    for _ in range(400):
        recorded, fresh = rng.beta(1, 1, (6, 100)), rng.beta(1, 1, (6, 80))
        together += all(
            predict((rng.random((20, 100)) < mine).astype(float), 80, figures=6).contains(
                float((rng.random(80) < theirs).mean())
            )
            for mine, theirs in zip(recorded, fresh, strict=True)
        )
    assert 0.93 <= together / 400 <= 0.99


async def test_every_problem_is_asked_once_and_billed(backend: FakeVLLM) -> None:
    backend.models = ["autotts-tiny"]
    problems, done = held_back(3), []
    async with running(load(upstream=backend.url, **{**SMALL, "controller": "self_consistency"})) as url:
        answers = await ask_all(url, problems, 0.5, lambda: done.append(1))
    assert len(answers) == len(done) == 3
    assert {answer.controller for answer in answers} == {"self_consistency"}
    assert (tokens_of(answers) > 0).all()
    assert set(right_of(answers)) <= {0.0, 1.0}
