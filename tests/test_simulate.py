"""The fleet simulator against queueing theory, the evaluator and the proxy's own budgets."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from discovery.evaluation.replay_jobs import Job, ReplayRules, run_job
from tests.bench.fleet import BatchCurve, Budget, EpisodePlan, Fleet, Simulation, bursty, poisson
from tests.bench.real_load import CHAMPION
from tests.bench.simulate import POLICIES, plans_of, read_recordings
from tests.readability import ROOT

RECORDINGS = CHAMPION / "recordings.jsonl.xz"


def plan(*rounds: list[int], right: bool = True) -> EpisodePlan:
    return EpisodePlan(rounds, right)


def latencies(fleet: Fleet, plans: list[EpisodePlan], arrivals: list[float]) -> list[float]:
    outcome = Simulation(fleet).serve(plans, iter(arrivals), len(arrivals))
    return list(outcome.latencies_s)


def test_a_lone_episode_takes_the_longest_branch_of_each_round() -> None:
    fleet = Fleet(1, BatchCurve(0.01, 0.001), 8, request_cpu_s=0.5, round_cpu_s=0.25)
    one = plan([100], [10, 10])
    assert latencies(fleet, [one], [3.0]) == pytest.approx([0.5 + 100 * 0.011 + 0.25 + 10 * 0.012 + 0.25])


def test_a_shorter_sequence_leaves_and_the_other_runs_faster() -> None:
    fleet = Fleet(1, BatchCurve(0.01, 0.01), 8)
    assert latencies(fleet, [plan([10, 30])], [0.0]) == pytest.approx([10 * 0.03 + 20 * 0.02])


def test_sequences_beyond_the_limit_wait_in_order() -> None:
    fleet = Fleet(1, BatchCurve(0.01, 0.0), 1)
    assert latencies(fleet, [plan([10])], [0.0, 0.0, 0.0]) == pytest.approx([0.1, 0.2, 0.3])


def test_a_loaded_replica_spills_over_to_another() -> None:
    both = latencies(Fleet(2, BatchCurve(0.01, 0.0), 1), [plan([10])], [0.0] * 10)
    single = latencies(Fleet(1, BatchCurve(0.01, 0.0), 1), [plan([10])], [0.0] * 10)
    assert max(both) == pytest.approx(0.5)
    assert max(single) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("max_sequences", [1, 10_000], ids=["first come, first served", "processor sharing"])
def test_mean_latency_is_that_of_queueing_theory(max_sequences: int) -> None:
    """Poisson arrivals and exponential lengths at a load of 0.7: 1 / (μ - λ) for both disciplines (M/M/1)."""
    rng = random.Random(7)
    plans = [plan([max(1, round(rng.expovariate(1 / 10_000)))]) for _ in range(30_000)]
    mean_tokens = statistics.fmean(each.tokens for each in plans)
    fleet = Fleet(1, BatchCurve(0.0, 1 / mean_tokens), max_sequences)  # one second of service on average
    outcome = Simulation(fleet, seed=3).serve(plans, poisson(0.7, rng), 60_000)
    assert statistics.fmean(outcome.latencies_s) == pytest.approx(1 / (1 - 0.7), rel=0.1)
    assert outcome.replica_busy == pytest.approx(0.7, abs=0.02)


def test_bursts_have_the_mean_rate_and_fall_into_a_quarter_of_the_time() -> None:
    times = list(islice(bursty(5.0, random.Random(1)), 20_000))
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(5.0, rel=0.05)
    assert max(time % 20.0 for time in times) < 5.0


def test_keys_never_spend_more_than_their_budget_in_a_minute() -> None:
    plans = [plan([100 * n]) for n in range(1, 10)]
    budget = Budget(3, 5_000, 900)
    fleet = Fleet(2, BatchCurve(0.001, 0.0001), 64)
    outcome = Simulation(fleet, budget, seed=1).serve(plans, poisson(20.0, random.Random(1)), 5_000)
    assert 4_000 < outcome.most_per_key <= 5_000
    assert 0 < outcome.refused < outcome.offered


def test_equal_seeds_give_equal_outcomes() -> None:
    fleet = Fleet(3, BatchCurve(0.001, 0.0001), 16, round_cpu_s=0.001)
    plans = [plan([50] * n, [20], right=n % 2 == 0) for n in range(1, 9)]
    first, second = (Simulation(fleet, seed=5).serve(plans, poisson(30.0, random.Random(2)), 500) for _ in range(2))
    assert first == second
    assert first.goodput > 0
    assert first.p95_s > 0


def test_a_batch_curve_is_the_line_through_its_points() -> None:
    assert BatchCurve.fit([(n, 0.004 + 0.0002 * n) for n in (1, 4, 16)]) == pytest.approx((0.004, 0.0002))
    assert BatchCurve.fit([(1, 0.02), (8, 0.01)]).sequence_s == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("policy", [POLICIES[2], POLICIES[3]], ids=lambda policy: policy.label)
def test_plans_spend_what_the_evaluator_reports(policy: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chosen = next(each for each in POLICIES if each is policy)
    recordings = read_recordings(RECORDINGS)
    plans = plans_of(chosen, recordings, 2, 48)
    cell = ("autotts-tiny", "chains", "held-out")
    job = Job(chosen.spec, chosen.beta, cell, range(2))  # type: ignore[arg-type]
    outcomes = run_job(job, recordings, ReplayRules(max_branches=48)).outcomes
    assert sum(each.is_right for each in plans) == outcomes[0].sum()
    assert sum(each.tokens for each in plans) == outcomes[2].sum()
    path = sum(max(spent, default=0) for each in plans for spent in each.rounds)
    assert path == outcomes[5].sum()


def test_a_quick_simulation_measures_checks_and_draws(vllm: str, tmp_path: Path) -> None:
    drawn = tmp_path / "load.svg"
    command = [sys.executable, "-m", "tests.bench.simulate", "--quick", "--check", "--upstream", vllm]
    ran = subprocess.run(
        [*command, "--out", str(drawn)], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for heading in ("milliseconds of a step", "Poisson arrivals", "bursts", "budgets", "units for 1,000", "simulated"):
        assert heading in ran.stdout
    assert "<svg" in drawn.read_text()
