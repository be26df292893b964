"""The compiled kernel plays what the controller file of a genome plays, to the token. Compiling takes half a minute."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controllers import Limits, State, run_episode, run_sync
from controllers.loading import Spec
from controllers.signals import NO_SIGNALS
from controllers.stopping import e_value
from controllers.voting import confidence
from discovery.data.recordings import RecordedBranch, Recording, intern_answers
from discovery.errors import BranchCensored
from discovery.evaluation.replay import ReplayEnvironment, branch_order
from discovery.evaluation.replay_jobs import Job, ReplayRules, Sealing, run_job
from discovery.search.cascade import REFERENCE
from discovery.search.explorers.classics import CLASSICS
from discovery.search.explorers.controller_writer import emit
from discovery.search.explorers.genome import PARTS, Genome, genome_of, knobs
from discovery.search.kernel import jit
from discovery.search.kernel.cell_records import cell_records
from discovery.search.kernel.policies import COMPONENTS, is_playable, policy_records, wave_records
from discovery.search.kernel.vote_tables import MOST_VOTES, vote_tables
from tests.discovery.evaluation.test_evaluate import CELL, question
from tests.discovery.search.test_grammar import COMBINATIONS, made, numbered

pytest.importorskip("numba", reason="numba is not installed")

RULES = ReplayRules(sealing=Sealing.NONE)
BETAS = (0.0, 0.3, 1.0)
SHUFFLES = range(1, 2)


def odd_recording(number: int, unknown: float | None, greedy: bool = False, charged: bool = True) -> Recording:
    """Return a recording with unreadable answers, chains without probes, and chains that end before their last probe.

    `unknown` is the share of unknown signals; None means that no signals were recorded.
    """
    rng = random.Random(number)
    branches = []
    for _ in range(rng.choice([3, 12, 20])):
        probes = [rng.choice(["7", "7", "8", "9", None]) for _ in range(rng.choice([0, 1, 3, 6, 9]))]
        tokens = max(0, 100 * len(probes) + rng.randint(-40, 99))
        costs = [rng.randint(1, 9) if charged else 0 for _ in probes]
        signals: list[list[int | None]] = [[], [], []]
        if unknown is not None:
            sure = [None if rng.random() < unknown else rng.randint(300, 1000) for _ in range(len(probes) + 1)]
            low = [None if value is None else rng.randint(0, value) for value in sure]
            signals = [list(sure), list(low), [rng.choice([None, 400, 999]) for _ in probes]]
        branches.append(RecordedBranch(probes, tokens, rng.choice(["7", "7", "8", None]), costs, True, *signals))
    sampling = {"temperature": 0} if greedy else {}
    return intern_answers(replace(question(number), branches=branches, sampling=sampling))


RECORDINGS = [
    odd_recording(1, None),
    odd_recording(2, 0.0),
    odd_recording(3, 0.1, greedy=True),
    odd_recording(4, 0.0, charged=False),
    intern_answers(question(5, branches=40)),
]


@cache
def kernel_cell(rules: ReplayRules) -> Any:
    from discovery.search.kernel.kernel_pool import KernelCell

    return KernelCell(RECORDINGS, rules)


def figures(genome: Genome, beta: float, recording: Recording, shuffle: int, rules: ReplayRules) -> tuple[int, ...]:
    """Return the answer, tokens, critical path, rounds and chains of an episode that the runner plays."""
    spec, order = Spec("mine", emit(genome)), branch_order(recording, shuffle)
    environment = ReplayEnvironment(recording, order, rules.probe_tokens, spec.signals & rules.signals)
    state = State(Limits(recording.interval, min(rules.max_branches, recording.branches)))
    run_sync(run_episode(made(emit(genome))(beta), environment, state))
    answer = -1 if state.answer is None else environment.revealed[state.answer]
    return answer, state.spent, environment.critical_path, state.rounds, state.width


def check_equal(genome: Genome, rules: ReplayRules = RULES) -> None:
    """Check that kernel and runner play the same episodes."""
    played = kernel_cell(rules).play(policy_records(genome, BETAS), SHUFFLES)
    for number, beta in enumerate(BETAS):
        for at, recording in enumerate(RECORDINGS):
            expected = figures(genome, beta, recording, SHUFFLES.start, rules)
            columns = played.outcomes[number, [2, 5, 3, 4], 0, at].tolist()
            assert (int(played.answers[number, 0, at]), *columns) == expected, (genome, beta, at)


@pytest.mark.slow
def test_random_genomes_are_played_to_the_token() -> None:
    """Every component occurs several times."""
    drawn = random.Random(7).sample(COMBINATIONS, 60)
    assert all(any(parts[part] == name for parts in drawn) for part, names in PARTS.items() for name in names)
    for seed, parts in enumerate(drawn):
        check_equal(numbered(parts, seed))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{part: name} for part, names in PARTS.items() for name in names], ids=str)
def test_each_component_is_played_to_the_token(parts: dict[str, str]) -> None:
    many = {"most": (64, 64, 1), "first": (4, 16, 1), "enough": (64, 64, 1), "lead": (2, 3, 1)}
    check_equal(genome_of({"widen": "growing", "stop": "lead"} | parts, **many))
    check_equal(genome_of({"weight": "confidence", "pool": "all", "pace": "lead"} | parts, **many))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [replace(RULES, probe_tokens=20), replace(RULES, max_branches=5), replace(RULES, signals=NO_SIGNALS)],
    ids=["price of probes", "few branches", "no signals"],
)
def test_rules_of_an_evaluation_hold_in_the_kernel(rules: ReplayRules) -> None:
    for genome in CLASSICS:
        check_equal(genome, rules)


@pytest.mark.slow
def test_outcomes_have_all_columns_of_a_job() -> None:
    for seed, genome in enumerate([*CLASSICS, numbered({"prune": "deviant", "depth": "horizon"}, 3)]):
        beta, shuffles = (seed % 4) / 3, range(2, 4)
        expected = run_job(Job(Spec("mine", emit(genome)), beta, CELL, shuffles), RECORDINGS, RULES)
        assert (
            kernel_cell(RULES).play(policy_records(genome, [beta]), shuffles).outcomes[0] == expected.outcomes
        ).all()


@pytest.mark.slow
@pytest.mark.parametrize("rules", [RULES, replace(RULES, max_branches=5)], ids=["all branches", "few branches"])
def test_the_reference_is_played_to_the_token(rules: ReplayRules) -> None:
    betas, shuffles = [at / 16 for at in range(17)], range(3)
    played = kernel_cell(rules).play_waves(wave_records(betas), shuffles)
    for number, beta in enumerate(betas):
        expected = run_job(Job(Spec(REFERENCE), beta, CELL, shuffles), RECORDINGS, rules)
        assert (played.outcomes[number] == expected.outcomes).all(), beta


@pytest.mark.slow
def test_every_second_question_can_be_played() -> None:
    policies = policy_records(CLASSICS[0], BETAS)
    played, some = kernel_cell(RULES).play(policies, SHUFFLES), kernel_cell(RULES).play(policies, SHUFFLES, every=2)
    assert (some.outcomes == played.outcomes[..., ::2]).all()


# What the kernel covers


def test_all_structures_of_the_grammar_are_covered() -> None:
    assert sum(is_playable(genome_of(parts)) for parts in COMBINATIONS) == prod(map(len, PARTS.values())) == 16_128


def test_a_genome_with_an_unknown_component_is_left_to_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    genome = genome_of({"stop": "gain"})
    assert is_playable(genome)
    monkeypatch.setitem(COMPONENTS, "stop", {"share": 1})
    assert not is_playable(genome)
    assert not is_playable({})


def test_knobs_have_the_values_that_a_controller_file_computes() -> None:
    for seed, parts in enumerate(random.Random(1).sample(COMBINATIONS, 40)):
        genome = numbered(parts, seed)
        policies = policy_records(genome, BETAS)
        for policy, beta in zip(policies, BETAS, strict=True):
            controller = made(emit(genome))(beta)
            for knob in knobs(genome):
                assert policy[knob.name] == getattr(controller, knob.name), knob.name


def test_a_genome_with_more_chains_than_the_kernel_has_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match="most = 65: the kernel has room for 64 chains"):
        policy_records(genome_of({}, most=(65, 65, 1)), [1.0])


def test_recordings_that_are_not_complete_are_refused() -> None:
    recorded = question(1)
    censored = replace(recorded, branches=[recorded.branches[0]._replace(complete=False), *recorded.branches[1:]])
    with pytest.raises(BranchCensored, match="has branches that were not recorded to their end"):
        cell_records([intern_answers(censored)], RULES)


# Statistics


def test_tables_hold_what_controllers_compute() -> None:
    rng = random.Random(0)
    counts = [0, 1, 2, 63, 64, MOST_VOTES]
    pairs = [*itertools.product(counts, counts), *((rng.randint(0, 64), rng.randint(0, 64)) for _ in range(60))]
    for first, second in pairs:
        assert vote_tables()[:, first, second].tolist() == [confidence(first, second), e_value(first, second)]


@pytest.mark.slow
def test_sums_are_those_of_python() -> None:
    from discovery.search.kernel.votes import total_of

    rng = random.Random(0)
    for _ in range(50):
        values = [rng.choice([rng.randint(0, 9), rng.uniform(-1, 1) * 10 ** rng.randint(-9, 9)]) for _ in range(20)]
        is_int = np.array([isinstance(value, int) for value in values], np.int64)
        assert total_of(np.array(values, float), is_int, len(values)) == sum(values)


def test_sums_are_compensated_where_python_compensates_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from discovery.search.kernel import votes

    plain = votes.total_of.py_func  # type: ignore[attr-defined]
    for is_compensated, tenths in ((False, 0.9999999999999999), (True, 1.0)):
        monkeypatch.setattr(votes, "COMPENSATED", is_compensated)
        assert plain(np.full(10, 0.1), np.zeros(10, np.int64), 10) == tenths
    ints = np.array([1e16, 1.0, 1.0, -1e16])
    assert plain(ints, np.zeros(4, np.int64), 4) == 2.0
    assert plain(ints, np.array([0, 1, 1, 0]), 4) == 0.0  # ints are not compensated


# numba and its cache on disk


def test_a_numba_that_cannot_be_imported_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert jit.is_available()
    (tmp_path / "numba.py").write_text("raise ImportError('it needs an older numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    assert not jit.is_available()
    assert "numba is installed, but cannot be imported: it needs an older numpy" in caplog.text
    monkeypatch.setattr(jit, "find_spec", lambda name: None)
    assert not jit.is_available()


def test_compiled_code_is_cached_in_a_folder_of_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folder = jit.cache_folder.__wrapped__()
    assert folder is not None
    assert folder.parent == tmp_path
    monkeypatch.setattr(jit, "COMPILED_FILES", jit.COMPILED_FILES[1:])
    assert jit.cache_folder.__wrapped__() not in (None, folder)


def test_without_a_writable_folder_compiled_code_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert jit.cache_folder.__wrapped__() is None
    assert "set NUMBA_CACHE_DIR to a writable folder" in caplog.text


def test_all_files_with_compiled_code_decide_about_the_cache() -> None:
    files = Path(jit.__file__).parent.glob("*.py")
    assert {file.name for file in files if "\n@compiled\n" in file.read_text()} | {"records.py"} == {
        *jit.COMPILED_FILES
    }
