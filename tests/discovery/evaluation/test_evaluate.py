"""The evaluator: scores, failing controllers, label weights, agreement between engines, traces and the command."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from controllers import Limits, Round, State, run_episode, run_sync
from controllers.loading import Spec, make, parse_spec
from discovery.answers import redacted
from discovery.commands.evaluate import _show as show
from discovery.commands.evaluate import parse_weights
from discovery.data.importers import format_recording_line
from discovery.data.mapped_recordings import load_mapped, write_mapped
from discovery.data.recordings import (
    NO_ANSWER,
    Cell,
    LabelSource,
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    intern_answers,
    question_id,
)
from discovery.data.traces import read_trace, trace_files
from discovery.errors import EngineError, RecordingsNotFound, TraceError
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import (
    DEFAULT_WEIGHTS,
    AnswerComparison,
    Evaluation,
    Weights,
    pool_recordings,
    regrade,
)
from discovery.evaluation.replay import ReplayEnvironment, shuffled_order
from discovery.evaluation.replay_jobs import OUTCOME_COLUMNS, TOKEN_KINDS, ReplayRules, Sealing
from discovery.evaluation.scores import (
    QuestionGrading,
    Score,
    paired_differences,
    paired_interval,
    pool_scores,
)
from discovery.evaluation.sources import select_cells
from proxy.cli import app
from tests.readability import ROOT

CELL = Cell("m", "b", Split.SEARCH)


class Given:
    """Recording source that holds the given recordings."""

    def __init__(self, *recordings: RecordedQuestion) -> None:
        self.recordings = recordings

    def cells(self) -> Sequence[Cell]:
        return list(dict.fromkeys(Cell(one.model, one.benchmark, one.split) for one in self.recordings))

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        return [one for one in self.recordings if Cell(one.model, one.benchmark, one.split) == cell]


def question(number: int, branches: int = 16, benchmark: str = "b", **changes: Any) -> RecordedQuestion:
    """Return a question with chains of varied length, two thirds of which end in 7."""
    rng = np.random.default_rng(number)
    chains = []
    for _ in range(branches):
        length = int(rng.integers(60, 900))
        final = "7" if rng.random() < 0.67 else str(rng.integers(8, 12))
        probes = [final if rng.random() < at / 9 else str(rng.integers(0, 12)) for at in range(length // 100)]
        chains.append(RecordedBranch(probes, length, final, [3] * len(probes)))
    about: dict[str, Any] = {"reference": "7", "interval": 100} | changes
    return RecordedQuestion(question_id(str(number)), "m", benchmark, branches=chains, **about)


SOURCE = Given(*(question(i) for i in range(6)), *(question(i, benchmark="c") for i in range(6, 10)))


def scores(
    *names: str | Spec, source: Given = SOURCE, engine: EngineName = EngineName.LOCAL, **changes: Any
) -> list[Score]:
    about: dict[str, Any] = {"betas": [0.0, 1.0], "shuffles": 7} | changes
    cells = about.pop("cells", source.cells())
    rules = about.pop("rules", ReplayRules(max_branches=16))
    specs = [name if isinstance(name, Spec) else parse_spec(name) for name in names]
    return Evaluation(source, cells, specs, rules=rules, **about).run(make_engine(engine, 2))


def without_time(score: Score) -> dict[str, Any]:
    return {key: value for key, value in score.as_json().items() if key not in ("seconds", "decisions_per_s")}


def columns(measured: Sequence[Score]) -> list[Any]:
    return [score.outcomes.tolist() for score in measured]


@pytest.mark.parametrize(
    ("names", "branches", "allowed", "message"),
    [
        (("sc",), 16, 64, "m b search: only 16 branches are recorded, 64 are allowed: sc at β = 1 opened all of them"),
        (("sc@16", "single"), 16, 64, None),
        (("sc",), 16, 16, None),
        (("sc",), 64, 64, None),
    ],
)
def test_scores_limited_by_recordings_are_reported(
    caplog: pytest.LogCaptureFixture, names: tuple[str, ...], branches: int, allowed: int, message: str | None
) -> None:
    source = Given(*(question(i, branches) for i in range(4)))
    measured = scores(*names, source=source, rules=ReplayRules(max_branches=allowed))
    warnings = [record.getMessage() for record in caplog.records if "are recorded" in record.getMessage()]
    assert len(warnings) == (message is not None)
    assert message is None or warnings[0].startswith(message)
    assert {score.as_json()["recorded_branches"] for score in measured} == {branches}
    assert [score.beta for score in measured if score.limited] == ([] if message is None else [1.0])


def test_cells_are_pooled_by_model_and_over_all() -> None:
    other = [replace(one, model="n") for one in SOURCE.recordings[:3]]
    measured = scores("cmc", "asc", source=Given(*SOURCE.recordings, *other))
    together = pool_scores(measured)
    assert [(one.cell.model, one.controller, one.beta) for one in together] == [
        (model, name, beta) for model in ("m", "all") for name in ("cmc", "asc") for beta in (0.0, 1.0)
    ]
    for pooled in together:
        parts = [
            score
            for score in measured
            if (score.controller, score.beta) == (pooled.controller, pooled.beta)
            and pooled.cell.model in (score.cell.model, "all")
        ]
        right = np.concatenate([score.per_question("right") for score in parts])
        assert pooled.accuracy == pytest.approx(100 * right.mean())
        assert pooled.outcomes.shape[-1] == (10 if pooled.cell.model == "m" else 13)
    assert pool_scores(scores("cmc", source=Given(*SOURCE.recordings[:6]))) == []


def test_rows_over_several_models_have_no_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    other = [replace(one, model="n") for one in SOURCE.recordings]
    show(scores("cmc", source=Given(*SOURCE.recordings, *other), betas=[0.0], shuffles=1), {})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ cmc")]
    assert ["±" in row for row in rows] == [True] * 6 + [False]
    assert "all (20 over all models)" in rows[-1]


@pytest.mark.parametrize(("temperature", "pooled"), [(0, "gabc"), (0.0, "gabc"), (1, "gabgc"), (None, "gabgc")])
def test_recordings_of_one_question_are_pooled_with_one_greedy_branch(temperature: float | None, pooled: str) -> None:
    sampling = {"temperature": temperature}
    both = [
        replace(question(0), branches=[RecordedBranch([], 10, final) for final in finals], sampling=sampling)
        for finals in ("gab", "gc")
    ]
    (one,) = pool_recordings(both)
    assert "".join(branch.final or "-" for branch in one.branches) == pooled


def test_reported_figures_equal_those_of_replayed_episodes() -> None:
    score = scores("cmc", betas=[0.5], cells=[CELL])[0]
    right, tokens, paths, rounds, width = 0, 0, [], 0, 0
    for recorded in SOURCE.load(CELL):
        for shuffle in range(7):
            environment = ReplayEnvironment(intern_answers(recorded), shuffled_order(16, shuffle))
            state = State(Limits(100, 16))
            longest: list[int] = []

            def on_round(state: State, played: Round, longest: list[int] = longest) -> None:
                spent: dict[int, int] = {}
                for fact in played.facts:
                    spent[fact.branch] = spent.get(fact.branch, 0) + fact.tokens
                longest.append(max(spent.values(), default=0))

            run_sync(run_episode(make(Spec("cmc"), 0.5), environment, state, on_round))
            right += environment.is_right(state.answer)
            tokens += state.spent
            rounds += state.rounds
            width += state.width
            paths.append(sum(longest))
    figures = score.as_json()
    assert " ".join(figures).startswith(
        "controller beta model benchmark split episodes accuracy tokens tokens_by_kind "
        "rounds branches critical_path_mean critical_path_p95 decisions_per_s seconds"
    )
    assert figures["episodes"] == 42
    assert figures["accuracy"] == 100 * (right / 42)
    assert figures["tokens"] == tokens / 42 == pytest.approx(sum(figures["tokens_by_kind"].values()))
    assert figures["tokens_by_kind"]["probe"] > 0
    assert set(figures["tokens_by_kind"]) == set(TOKEN_KINDS)
    assert (figures["rounds"], figures["branches"]) == (rounds / 42, width / 42)
    assert figures["critical_path_mean"] == sum(paths) / 42
    assert figures["critical_path_p95"] == pytest.approx(np.percentile(paths, 95))


@pytest.mark.parametrize("priced", [False, True])
def test_the_critical_path_is_the_longest_branch_of_each_round(priced: bool) -> None:
    controller = """
from controllers import advance, answer, branch, probe, TO_END
class Mine:
    def __init__(self, beta): self.round = 0
    def decide(self, state):
        self.round += 1
        if self.round == 1: return [branch(2), branch(), branch(9)]
        if self.round == 2: return [advance(1), probe(1), advance(1, 2), advance(0)]
        if self.round == 3: return [advance(1, TO_END), advance(0, TO_END)]
        return [answer(state.leader())]
"""
    chains = [
        RecordedBranch(["1"] * 20, 2050, "7"),
        RecordedBranch(["1"] * 9, 905, "7"),
        RecordedBranch(["1"] * 9, 990, "7"),
    ]
    recorded = intern_answers(RecordedQuestion("q", "m", "b", 100, chains, "7"))
    environment = ReplayEnvironment(recorded, [0, 1, 2], probe_tokens=11 if priced else None)
    state = State(Limits(100))
    run_sync(run_episode(make(Spec("mine", controller), 0), environment, state))
    assert environment.critical_path == 900 + (300 + (11 if priced else 0)) + 1750


@pytest.mark.process
@pytest.mark.parametrize("engine", [EngineName.PROCESS, EngineName.RAY])
def test_every_engine_gives_exactly_the_same_scores(engine: EngineName, tmp_path: Path) -> None:
    if engine is EngineName.RAY:
        pytest.importorskip("ray", reason="the extra `ray` is not installed")
    names = ["cmc", "self_consistency@8", "parallel_probe"]
    here, there = scores(*names), scores(*names, engine=engine)
    assert [without_time(score) for score in there] == [without_time(score) for score in here]
    for local, remote in zip(here, there, strict=True):
        assert (local.outcomes == remote.outcomes).all()
    assert paired_differences(here) == paired_differences(there)


def test_branch_orders_are_the_same_for_every_controller_and_run() -> None:
    first, second, third = scores("cmc", "asc@16", betas=[1.0]), scores("asc@16", "cmc", betas=[1.0]), scores("cmc")
    assert without_time(first[0]) == without_time(second[1])
    assert without_time(first[0]) == without_time(third[1])


FAULTY = {
    "raises": "        raise ValueError('no idea')",
    "exits": "        raise SystemExit('bye')",
    "illegal": "        return [advance(3)]",
    "empty": "        return []",
    "nothing": "        return None",
    "loops": "        while True:\n            try: pass\n            except Exception: pass",
}
FAILURE_MESSAGES = {
    "raises": "Mine raised ValueError: no idea",
    "exits": "Mine raised SystemExit: bye",
    "illegal": "advance(): there is no branch 3; 1 are open",
    "empty": "an empty round makes no progress",
    "nothing": "Mine did not return a list of actions but None; return [branch()], for example",
    "loops": "it took longer than",
}


@pytest.mark.process
@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_controller_is_a_scored_failure(tmp_path: Path, fault: str) -> None:
    path = tmp_path / f"{fault}.py"
    path.write_text(
        "from controllers import advance, branch\n"
        "class Mine:\n"
        "    def __init__(self, beta): pass\n"
        "    def decide(self, state):\n"
        "        if not state.width: return [branch()]\n" + FAULTY[fault]
    )
    measured = scores(str(path), "single", betas=[1.0], cells=[CELL])
    figures = measured[0].as_json()
    assert (figures["accuracy"], figures["episodes"], figures["failures"]) == (0, 42, 42)
    assert FAILURE_MESSAGES[fault] in figures["failure"]
    assert figures["tokens"] == pytest.approx(100, rel=0.2)
    assert measured[1].as_json()["failures"] == 0


@pytest.mark.process
def test_a_constructor_that_fails_is_a_scored_failure(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text("class Mine:\n    def __init__(self, beta): 1 / beta\n    def decide(self, state): return []\n")
    figures = scores(str(path), betas=[0.0], cells=[CELL])[0].as_json()
    assert (figures["failures"], figures["tokens"]) == (42, 0)
    assert "its constructor raised ZeroDivisionError" in figures["failure"]


def test_only_complete_recordings_with_a_reference_are_scored() -> None:
    censored = question(1, split=Split.SEARCH)
    censored.branches[0] = censored.branches[0]._replace(complete=False)  # type: ignore[index]
    unknown = question(2, reference=None)
    assert scores("single", source=Given(question(0), censored, unknown))[0].episodes == 7
    with pytest.raises(
        RecordingsNotFound, match="m b search: none of 2 recordings is complete and has a reference answer"
    ):
        scores("single", source=Given(censored, unknown))


def test_cells_of_which_nothing_can_be_scored_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    unknown = question(2, benchmark="live", reference=None)
    measured = scores("single", source=Given(unknown, question(0)))
    assert {score.cell.benchmark for score in measured} == {"b"}
    assert "left out: m live search: none of 1 recordings is complete and has a reference answer" in caplog.text
    with pytest.raises(RecordingsNotFound, match="m live search: none of 1"):
        scores("single", source=Given(unknown, question(3, benchmark="other", reference=None)))


def versions(*changes: dict[str, Any], origin: Origin = Origin.LIVE) -> Given:
    """Return two questions of each version; the last version is the newest."""
    return Given(*(question(2 * i + j, origin=origin, **one) for i, one in enumerate(changes) for j in range(2)))


HOT: dict[str, Any] = {"sampling": {"temperature": 0.9}}
COOL: dict[str, Any] = {"sampling": {"temperature": 0.6}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (HOT, r"sampling \{\}\); \w{12} \(2: sampling {\"temperature\": 0.9}\)"),
        ({"interval": 50}, r"interval 100\); \w{12} \(2: interval 50\)"),
        ({"probe_template": "p"}, r"probe template unknown\); \w{12} \(2: probe template p\)"),
        ({"chat_template": "c"}, r"chat template unknown\); \w{12} \(2: chat template c\)"),
    ],
)
def test_imported_recordings_of_two_versions_are_not_mixed(change: dict[str, Any], message: str) -> None:
    source = versions({}, change, origin=Origin.IMPORTED)
    first = source.recordings[0].version.digest
    message = rf"recordings of 2 versions cannot be scored together: {first} \(2: {message}; choose one with"
    with pytest.raises(RecordingsNotFound, match=message):
        scores("single", source=source)
    mixed = Given(
        *versions({}, origin=Origin.COLLECTED).recordings, *versions(change, origin=Origin.IMPORTED).recordings
    )
    with pytest.raises(RecordingsNotFound, match="recordings of 2 versions cannot be scored together"):
        scores("single", source=mixed)


@pytest.mark.parametrize("origin", [Origin.LIVE, Origin.COLLECTED])
def test_the_newest_version_of_collected_recordings_is_scored(origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    source = versions(HOT, {}, COOL, origin=origin)
    older = [source.recordings[i].version.digest for i in (0, 2)]
    newest = source.recordings[-1].version.digest
    measured = scores("single", source=source)
    assert columns(measured) == columns(scores("single", source=Given(*source.recordings[4:])))
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"version {newest} is scored; left out: {older[0]} (2: sampling" in line
    assert f"; {older[1]} (2: sampling {{}})" in line


def test_one_request_with_other_sampling_does_not_exclude_the_rest() -> None:
    usual = versions({"chat_template": "old"}, HOT, HOT, origin=Origin.LIVE).recordings
    odd = versions(COOL, origin=Origin.LIVE).recordings[:1]
    measured = scores("single", source=Given(*usual, *odd))
    assert columns(measured) == columns(scores("single", source=Given(*usual[2:])))


@pytest.mark.parametrize("origin", Origin)
def test_an_older_version_can_be_selected_by_its_digest(origin: Origin) -> None:
    source = versions(HOT, COOL, origin=origin)
    first, second = (one.version.digest for one in source.recordings[::2])
    older = scores("single", source=source, version=first[:5])
    assert columns(older) == columns(scores("single", source=Given(*source.recordings[:2])))
    with pytest.raises(
        RecordingsNotFound, match=rf"no version 'zz' can be scored; versions: {first} \(2: .*; {second} \(2: "
    ):
        scores("single", source=source, version="zz")


def test_an_ambiguous_digest_prefix_of_a_version_is_refused() -> None:
    source = versions(*({"interval": 50 + i} for i in range(17)))  # at least two digests share their first digit
    begins = [one.version.digest[0] for one in source.recordings[::2]]
    twice = next(digit for digit in begins if begins.count(digit) > 1)
    with pytest.raises(RecordingsNotFound, match=rf"{begins.count(twice)} versions begin with '{twice}'; versions: "):
        scores("single", source=source, version=twice)


def test_a_newest_version_that_cannot_be_scored_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    source = versions(HOT, {**HOT, "chat_template": "new", "reference": None})
    assert scores("single", source=source)[0].episodes == 14
    assert f"no recording of the newest version, {source.recordings[-1].version.digest}, can be scored" in caplog.text
    caplog.clear()
    scores("single", source=source, version=source.recordings[0].version.digest)
    assert caplog.text == ""


def test_branches_of_one_question_from_several_requests_are_scored_together() -> None:
    complete = [question(i, origin=Origin.LIVE, request=f"r {i}") for i in range(3)]
    parts = [
        replace(recorded, request=f"r {recorded.request} {at}", branches=recorded.branches[at::2])
        for recorded in complete
        for at in (0, 1)
    ]
    (here,) = scores("self_consistency@16", betas=[1.0], source=Given(*parts))
    (there,) = scores("self_consistency@16", betas=[1.0], source=Given(*complete))
    assert here.outcomes.shape == there.outcomes.shape == (len(OUTCOME_COLUMNS), 7, 3)
    assert here.per_question("tokens") == pytest.approx(
        there.per_question("tokens")
    )  # both use all branches of each question


# Label sources and weights

FEEDBACK, CONSENSUS = LabelSource.FEEDBACK, LabelSource.CONSENSUS
MIXED = Given(
    *(question(i) for i in range(3)),
    *(question(i, label_source=FEEDBACK, confidence=0.5) for i in range(3, 6)),
    *(question(i, label_source=CONSENSUS, confidence=0.25 * (i - 5)) for i in range(6, 9)),
)


def test_consensus_labels_are_scored_only_on_request(caplog: pytest.LogCaptureFixture) -> None:
    (score,) = scores("cmc", betas=[1.0], source=MIXED)
    assert score.as_json()["label_sources"] == {"reference": 3, "feedback": 3}
    assert "weights" not in score.as_json()
    assert "recordings were left out because of how their reference answers are known: 3 by consensus" in caplog.text
    alone = Given(*MIXED.recordings[6:])
    with pytest.raises(
        RecordingsNotFound,
        match="3 by consensus, which do not count by default; `autotts evaluate --labels consensus`",
    ):
        scores("cmc", source=alone)
    (score,) = scores("cmc", betas=[1.0], source=alone, weights={CONSENSUS: 1.0})
    assert score.as_json()["label_sources"] == {"consensus": 3}
    with pytest.raises(RecordingsNotFound, match="are 3 by feedback and 3 by consensus"):
        scores("cmc", source=Given(*MIXED.recordings[3:]), weights={LabelSource.REFERENCE: 1.0})


ALL: Weights = dict.fromkeys(LabelSource, 1.0)


def test_label_weights_of_1_change_no_score() -> None:
    plain = Given(*(replace(one, label_source=LabelSource.REFERENCE) for one in MIXED.recordings))
    sure = Given(*(replace(one, confidence=1.0) for one in MIXED.recordings))
    names = ["cmc", "self_consistency@8"]
    expected = scores(*names, source=plain)
    for source, weights in ((MIXED, ALL), (sure, dict.fromkeys(LabelSource, None))):
        measured = scores(*names, source=source, weights=weights)
        for score, reference in zip(measured, expected, strict=True):
            figures = without_time(reference) | {"label_sources": {"reference": 3, "feedback": 3, "consensus": 3}}
            assert without_time(score) == figures
            assert score.error == reference.error
        assert paired_differences(measured) == paired_differences(expected)


def test_a_question_counts_in_proportion_to_its_weight() -> None:
    weights: Weights = {LabelSource.REFERENCE: 1.0, FEEDBACK: 0.5, CONSENSUS: None}
    of_each = np.array([1.0] * 3 + [0.5] * 3 + [0.25, 0.5, 0.75])
    (score,) = scores("cmc", betas=[1.0], source=MIXED, weights=weights)
    (plain,) = scores("cmc", betas=[1.0], source=MIXED, weights=ALL)
    figures = score.as_json()
    for name in ("tokens", "rounds", "branches", *TOKEN_KINDS):
        values = figures["tokens_by_kind"] if name in TOKEN_KINDS else figures
        assert values[name] == pytest.approx((of_each * plain.per_question(name)).sum() / of_each.sum())
    assert score.accuracy == pytest.approx(100 * (of_each * plain.per_question("right")).sum() / of_each.sum())
    assert score.accuracy != plain.accuracy
    assert (figures["episodes"], figures["failures"]) == (63, 0)
    assert figures["weights"] == {"reference": 1, "feedback": 0.5, "consensus": 0.5}
    few: Weights = {FEEDBACK: 0.2}
    assert scores("cmc", betas=[1.0], source=MIXED, weights=few)[0].outcomes.shape[-1] == 3


def graded(score: Score, weights: Sequence[float]) -> Score:
    return replace(score, grading=QuestionGrading([LabelSource.REFERENCE] * len(weights), weights))


def repeated(score: Score, times: Sequence[int]) -> Score:
    return replace(score, outcomes=np.repeat(score.outcomes, times, axis=-1))


def test_an_integer_weight_equals_repeating_the_question() -> None:
    (score,) = scores("cmc", betas=[1.0], source=MIXED, weights=ALL)
    times = [4, 4, 4, 2, 2, 2, 1, 2, 3]
    weighted, more = graded(score, [one / 4 for one in times]), repeated(score, times)
    for name in OUTCOME_COLUMNS:
        assert weighted.mean(name) == pytest.approx(more.mean(name))
    path = np.sort(more.column("critical_path").ravel())
    assert weighted.as_json()["critical_path_p95"] == path[int(np.ceil(0.95 * path.size)) - 1]
    assert graded(score, [0.3] * 9).error == pytest.approx(score.error)
    assert graded(score, [1.0] * 8 + [1e-9]).error == pytest.approx(
        replace(score, outcomes=score.outcomes[..., :8]).error, rel=0.02
    )


def test_paired_intervals_use_the_weights_of_questions() -> None:
    names, weights = ("self_consistency@1", "self_consistency@16"), [1.0] * 3 + [0.5] * 3 + [0.25] * 3
    measured = [graded(one, weights) for one in scores(*names, betas=[1.0], source=MIXED, weights=ALL)]
    (difference,) = paired_differences(measured)
    gained = 100 * (measured[1].per_question("right") - measured[0].per_question("right"))
    assert difference.accuracy == pytest.approx(np.average(gained, weights=weights))
    assert difference.low < difference.accuracy < difference.high
    assert difference.tokens == pytest.approx(measured[1].mean("tokens") / measured[0].mean("tokens"))
    assert paired_interval(gained, np.full(9, 0.5)) == pytest.approx(paired_interval(gained))
    assert (difference.low, difference.high) != paired_interval(gained)
    assert paired_interval(np.array([5.0, 5.0, 5.0]), np.array([1.0, 0.1, 0.2])) == pytest.approx((5, 5))


def test_a_weighted_interval_has_its_stated_coverage() -> None:
    rng = np.random.default_rng(8)
    hits = 0
    for _ in range(60):
        weights = rng.uniform(0.2, 1, 60)
        low, high = paired_interval(rng.normal(0.3, 1.0, 60), weights)
        hits += low <= 0.3 <= high
    assert 50 <= hits <= 60  # 57 are expected


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("reference", {LabelSource.REFERENCE: 1.0}),
        ("feedback=0.8, consensus = 1e-3", {FEEDBACK: 0.8, CONSENSUS: 0.001}),
        ("consensus=confidence", {CONSENSUS: None}),
        ("reference,feedback", dict(DEFAULT_WEIGHTS)),
    ],
)
def test_label_weights_are_parsed_from_text(text: str, weights: Weights) -> None:
    assert parse_weights(text) == weights


# Answers that cannot be read


@pytest.mark.parametrize("how", AnswerComparison)
@pytest.mark.parametrize("hidden", ["answers", "reference", "both", "one"])
def test_redacted_answers_are_graded_by_equality(how: AnswerComparison, hidden: str) -> None:
    spelled = ["7.0", "$7$", "8", "007", "9", "8"]
    hide = {"answers": range(6), "reference": (), "both": range(6), "one": [2]}[hidden]
    finals = [redacted(one) if at in hide else one for at, one in enumerate(spelled)]
    reference = redacted(" 7 ") if hidden in ("reference", "both") else " 7 "
    chains = [RecordedBranch([final], 150, final, [3]) for final in finals]
    recorded = RecordedQuestion("q", "m", "b", 100, chains, reference)
    recording = intern_answers(recorded) if how is AnswerComparison.EXACT else regrade(recorded)
    assert recording.finals.tolist() == recording.probes.tolist() == [0, 0, 1, 0, 2, 1]
    assert recording.reference == 0
    assert recording.answers == (finals[0], finals[2], finals[4])
    (score,) = scores("self_consistency@6", betas=[1.0], source=Given(recorded), answers=how, rules=ReplayRules(6))
    assert score.accuracy == 100


def test_unreadable_answers_beside_redacted_ones_are_no_answer() -> None:
    finals = [redacted("7"), "[placeholder]", "7", None]
    recorded = RecordedQuestion("q", "m", "b", 100, [RecordedBranch([], 10, final) for final in finals], "8")
    assert regrade(recorded).finals.tolist() == [0, NO_ANSWER, 0, NO_ANSWER]
    assert regrade(recorded).reference == intern_answers(recorded).reference == NO_ANSWER


def test_a_controller_with_more_chains_than_recorded_is_refused() -> None:
    with pytest.raises(RecordingsNotFound, match="asc@17 opens 17 branches, but m b search has 16 per question"):
        scores("asc@17", rules=ReplayRules(max_branches=64))


def test_canonical_comparison_grades_answers_as_the_proxy_does() -> None:
    chains = [RecordedBranch([], 10, answer) for answer in ("7.0", "007", "8", "$7$", "8")]
    source = Given(RecordedQuestion("q", "m", "b", 100, chains, " 7 "))
    exact, canonical = (
        scores("self_consistency@5", source=source, betas=[1.0], answers=how, rules=ReplayRules(5))[0]
        for how in (AnswerComparison.EXACT, AnswerComparison.CANONICAL)
    )
    assert (exact.accuracy, canonical.accuracy) == (0, 100)


@pytest.mark.parametrize(
    ("origins", "accuracy", "how"),
    [
        ([Origin.IMPORTED], 0, "exact"),
        ([Origin.COLLECTED], 100, "canonical"),
        ([Origin.LIVE], 100, "canonical"),
        ([Origin.IMPORTED, Origin.LIVE], 100, "canonical"),
    ],
)
def test_the_default_comparison_is_exact_only_for_imported_recordings(
    origins: Sequence[Origin], accuracy: float, how: str
) -> None:
    chains = [RecordedBranch([], 10, answer) for answer in ("7.0", "007", "8", "$7$", "8")]
    asked = RecordedQuestion("q", "m", "b", 100, chains, " 7 ")
    source = Given(*(replace(asked, question=str(at), origin=origin) for at, origin in enumerate(origins)))
    (score,) = scores("self_consistency@5", source=source, betas=[1.0], rules=ReplayRules(5))
    assert (score.accuracy, score.as_json()["answers"]) == (accuracy, how)


def test_missing_cells_are_refused_with_the_available_ones() -> None:
    cells = [CELL, Cell("n", "c", Split.HELD_OUT)]
    assert select_cells(cells, ["n"], [], None) == cells[1:]
    assert select_cells(cells, [], [], Split.SEARCH) == cells[:1]
    for models, benchmarks, split, message in (
        (["x"], [], None, "no recordings of model 'x'; available: m, n"),
        ([], ["x"], None, "no recordings of benchmark 'x'; available: b, c"),
        ([], [], Split.VALIDATION, "no recordings of split 'validation'; available: held-out, search"),
        (["m"], ["c"], None, "models, benchmarks and split; available: m b search; n c held-out"),
    ):
        with pytest.raises(RecordingsNotFound, match=message):
            select_cells(cells, models, benchmarks, split)
    with pytest.raises(RecordingsNotFound, match="there are no recordings yet; `autotts collect` makes some"):
        select_cells([], [], [], None)


def test_paired_differences_are_computed_per_question() -> None:
    measured = scores("self_consistency@1", "self_consistency@16", betas=[1.0])
    (difference,) = paired_differences(measured)
    assert (difference.controller, difference.against, difference.questions) == (
        "self_consistency@16",
        "self_consistency@1",
        10,
    )
    wins = np.concatenate(
        [measured[2 * i + 1].per_question("right") - measured[2 * i].per_question("right") for i in (0, 1)]
    )
    assert difference.accuracy == pytest.approx(100 * wins.mean())
    assert difference.low < difference.accuracy < difference.high
    assert difference.tokens == pytest.approx(16, rel=0.2)
    assert paired_differences(measured[:1]) == []


def test_a_paired_interval_has_its_stated_coverage() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(60):
        low, high = paired_interval(rng.normal(0.3, 1.0, 60))
        hits += low <= 0.3 <= high
    assert 50 <= hits <= 60  # 57 are expected; fewer than 50 come up in a run of ten thousand


def test_memory_mapped_recordings_are_equal_and_read_only(tmp_path: Path) -> None:
    recordings = [intern_answers(one) for one in SOURCE.recordings]
    taken = load_mapped(write_mapped(recordings, tmp_path / "shelf"))
    for recording, mapped in zip(recordings, taken, strict=True):
        assert recording.rows == mapped.rows
        assert (recording.question, recording.answers, recording.reference) == (
            mapped.question,
            mapped.answers,
            mapped.reference,
        )
        assert not mapped.probes.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            mapped.probes[0] = 1


def test_traces_reproduce_every_round_and_final_state(tmp_path: Path) -> None:
    rules = ReplayRules(16, traces=tmp_path)
    plain, traced = scores("cmc", "asc@16"), scores("cmc", "asc@16", rules=rules)
    assert [without_time(one) for one in plain] == [without_time(one) for one in traced]
    files = trace_files(tmp_path)
    assert len(files) == 2 * 2 * 2  # cells, controllers, βs
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".npz"] == []
    for file in files:
        trace = read_trace(file)
        cell = Cell(trace.about["model"], trace.about["benchmark"], Split(trace.about["split"]))
        recordings = SOURCE.load(cell)
        for at, episode in enumerate(trace.episodes()):
            rounds: list[Round] = []
            environment = ReplayEnvironment(
                intern_answers(recordings[episode.question]), shuffled_order(16, episode.shuffle)
            )
            state = State(Limits(100, 16))
            controller = make(Spec(trace.about["controller"]), trace.about["beta"])
            run_sync(run_episode(controller, environment, state, lambda _, played: rounds.append(played)))  # noqa: B023
            assert [(list(a), list(f)) for a, f in trace.rounds(at)] == [(list(a), list(f)) for a, f in rounds]
            *_, (last, _) = trace.states(at)
            assert (last.spent, last.answer, last.stop) == (state.spent, state.answer, state.stop)
            assert (episode.answer, episode.right) == (state.answer, environment.is_right(state.answer))


def test_files_that_are_not_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no traces there"):
        trace_files(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    with pytest.raises(TraceError, match=r"x\.npz: not a file of traces"):
        read_trace(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", about=np.array(json.dumps({"format": 99})))
    with pytest.raises(TraceError, match="is in format 99, but this program reads format 1"):
        read_trace(tmp_path / "y.npz")


@pytest.mark.process
def test_a_dead_worker_process_is_reported_in_one_line() -> None:
    source = "import os\nclass Mine:\n    def __init__(self, beta): pass\n    def decide(self, state): os._exit(3)\n"
    rules = ReplayRules(16, sealing=Sealing.NONE)
    with pytest.raises(EngineError, match="a worker process died"):
        scores(Spec("dies", source), rules=rules, engine=EngineName.PROCESS)


def autotts(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=folder, env=environment
    )


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Return a JSON Lines file with all recordings of SOURCE."""

    path = tmp_path / "lines.jsonl"
    path.write_text("".join(map(format_recording_line, SOURCE.recordings)))
    return path


def test_evaluate_warns_of_held_out_questions(tmp_path: Path) -> None:
    file = tmp_path / "both.jsonl"
    first, second, *_ = SOURCE.recordings
    both = (first, replace(second, split=Split.HELD_OUT, benchmark="exam"))
    file.write_text("".join(map(format_recording_line, both)))
    asked = ["evaluate", "--recordings", str(file), "--betas", "1", "--shuffles", "1", "--max-branches", "8"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "held-out questions are included (exam): do not choose" in done.stderr
    assert "held-out questions are" not in CliRunner().invoke(app, [*asked, "--split", str(first.split)]).stderr


@pytest.mark.process
def test_import_evaluate_trace_and_export_work_on_the_command_line(tmp_path: Path, lines: Path) -> None:
    done = autotts("import", "jsonl", "lines.jsonl", "--store", "s.db", folder=tmp_path)
    assert (done.returncode, done.stdout) == (
        0,
        "s.db: 10 recordings of 10 new questions, 160 branches added; 0 recordings were already there\n",
    )
    done = autotts("import", "jsonl", "lines.jsonl", "--store", "s.db", folder=tmp_path)
    assert "0 branches added; 10 recordings were already there" in done.stdout
    asked = ["--controllers", "cmc,asc@16", "--betas", "0,1", "--shuffles", "3", "--split", "search"]
    asked += ["--max-branches", "16", "--json", "-"]
    by_source = []
    for name in ("s.db", "lines.jsonl"):
        done = autotts("evaluate", "--recordings", name, *asked, folder=tmp_path)
        assert "held-out" not in done.stderr
        by_source.append(json.loads(done.stdout))
    for rows in by_source:
        for row in rows:
            del row["seconds"], row["decisions_per_s"]
    assert by_source[0] == by_source[1]
    assert [(row["controller"], row["beta"], row["benchmark"]) for row in by_source[0]] == [
        (name, beta, benchmark) for benchmark in "bc" for name in ("cmc", "asc@16") for beta in (0, 1)
    ]
    assert not any(math.isnan(row["tokens"]) for row in by_source[0])
    assert [row.get("difference", {}).get("against") for row in by_source[0]] == [None, None, "cmc", "cmc"] * 2
    for row, first in zip(by_source[0][2:4], by_source[0][:2], strict=True):
        compared, other = row["difference"], by_source[0][by_source[0].index(row) + 4]["difference"]
        assert compared == other  # of the model, over its cells
        assert compared["low"] <= compared["points"] <= compared["high"]
        assert (
            compared["questions"]
            == sum(each["questions"] for each in by_source[0] if each["beta"] == first["beta"]) / 2
        )
    shown = ["--max-branches", "16", "--shuffles", "2", "--engine", "process", "--traces", "tr", "--plot", "p.svg"]
    done = autotts("evaluate", "--recordings", "s.db", "--json", "f.json", *shown, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "accuracy %" in done.stdout
    assert "all (10 questions)" in done.stdout
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    rows = json.loads((tmp_path / "f.json").read_text())
    areas = {row["benchmark"]: row["afs"] for row in rows}
    assert len(rows) == 6
    assert done.stdout.count("AFS: mean accuracy") == 1
    assert all(f"{area:.2f}" in done.stdout for area in (*areas.values(), sum(areas.values()) / 2))
    done = autotts("evaluate", "--recordings", "s.db", "--betas", "1", "--shuffles", "1", folder=tmp_path)
    assert "AFS" not in done.stdout
    done = autotts(
        "trace",
        "show",
        "tr/m/b/search/adaptive_consistency-beta-1",
        "--question",
        "2",
        "--shuffle",
        "1",
        folder=tmp_path,
    )
    assert "question 2, shuffle 1" in done.stdout
    assert "answer" in done.stdout
    assert "shuffles 0 to 1" in autotts("trace", "show", "tr", folder=tmp_path).stdout
    exported = autotts("store", "export", "again.jsonl", "--store", "s.db", folder=tmp_path)
    assert exported.stdout == "again.jsonl: 10 recordings\n"
    assert sorted((tmp_path / "again.jsonl").read_text().splitlines()) == sorted(lines.read_text().splitlines())
    assert '"feedback": 0' in autotts("store", "verify", "--json", "--store", "s.db", folder=tmp_path).stdout
    assert (
        json.loads(autotts("store", "info", "--json", "--store", "s.db", folder=tmp_path).stdout)["cells"][0][
            "branches"
        ]
        == 96
    )


def test_two_files_of_one_name_are_refused_and_one_named_twice_counts_once(tmp_path: Path) -> None:
    found = ROOT / "controllers/discovered/lockstep_lead.py"
    for folder in ("v1", "v2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"{found.read_text()}# {folder}\n")
    named = f"cmc,{tmp_path}/v1/mine.py,{tmp_path}/v2/mine.py"
    done = CliRunner().invoke(app, ["evaluate", "--recordings", str(tmp_path), "--controllers", named])
    assert done.exit_code == 2
    assert "--controllers: two are named mine; rename a file, because figures are kept by name" in " ".join(
        done.output.split()
    )
    done = CliRunner().invoke(app, ["evaluate", "--recordings", str(tmp_path / "none"), "--controllers", "cmc,cmc"])
    assert "no such file or folder" in done.output


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--controllers", "cmcc"], "there is no controller 'cmcc'; there are single"),
        (["--controllers", "none.py"], "none.py: No such file or directory"),
        (["--controllers", ","], "--controllers is empty"),
        (["--betas", "nan"], "--betas must be a decimal number from 0 to 1 such as 0.5, not 'nan'"),
        (["--betas", "0,1.5"], "not '1.5'"),
        (["--split", "validation"], "no recordings of split 'validation'; available: search"),
        (["--split", "test"], "'test' is not one of 'search', 'validation', 'held-out'"),
        (["--shuffles", "0"], "Invalid value for '--shuffles'"),
        (["--recordings", "none.db"], "none.db: no such file or folder"),
        (["--recordings", "lines.jsonl", "--plot", "p.gif"], "must end in .png or .svg"),
        (["--json", "no/f.json"], "there is no folder"),
        (["--controllers", "asc@99"], "asc@99 opens 99 branches"),
        (["--labels", "hearsay"], "--labels: unknown source 'hearsay'; use reference, feedback, consensus"),
        (["--labels", ","], "--labels is empty"),
        (["--labels", "feedback,feedback=0.5"], "--labels names feedback twice"),
        (["--labels", "feedback=0"], "'feedback=0': the weight must be above 0 and at most 1, or 'confidence'"),
        (["--labels", "feedback=1.5"], "'feedback=1.5': the weight must be above 0 and at most 1"),
        (["--labels", "feedback=nan"], "'feedback=nan': the weight must be above 0 and at most 1"),
        (["--labels", "feedback="], "'feedback=': the weight must be above 0 and at most 1"),
        (["--labels", "consensus"], "m b search: the only reference answers are 6 by reference"),
        (["--version", "zz"], "m b search: no version 'zz' can be scored; versions: "),
    ],
)
def test_invalid_arguments_of_evaluate_give_one_line_and_leave_no_file(
    tmp_path: Path, lines: Path, arguments: list[str], message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    done = autotts("evaluate", "--recordings", "lines.jsonl", *arguments, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.process
def test_the_evaluate_command_reports_label_sources_and_versions(tmp_path: Path) -> None:

    newer = [replace(one, origin=Origin.LIVE, request=f"r {at}", **COOL) for at, one in enumerate(MIXED.recordings)]
    older = [replace(one, request=f"s {at}", sampling={}) for at, one in enumerate(newer[:2])]
    (tmp_path / "l.jsonl").write_text("".join(map(format_recording_line, [*older, *newer])))
    asked = ["evaluate", "--recordings", "l.jsonl", "--shuffles", "2", "--betas", "1", "--max-branches", "16"]
    done = autotts(*asked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "m b search: answer comparison: canonical; correct answers: 3 from reference, 3 from feedback\n" in done.stdout
    )
    unknown, versions, uneven = done.stderr.splitlines()
    assert "recordings were left out" in unknown
    assert "3 by consensus" in unknown
    assert f"version {newer[0].version.digest} is scored" in versions
    assert "accuracy is biased if clients judge right answers more often" in uneven
    asked += ["--labels", "reference,feedback=0.8,consensus=confidence", "--version", older[0].version.digest]
    done = autotts(*asked, "--json", "-", folder=tmp_path)
    assert (done.stderr, json.loads(done.stdout)[0]["label_sources"]) == ("", {"reference": 2})
    asked[-1] = newer[0].version.digest
    done = autotts(*asked, "--json", "f.json", folder=tmp_path)
    assert "3 from reference, 3 from feedback with weight 0.8, 3 from consensus with weight 0.5" in done.stdout
    (figures,) = json.loads((tmp_path / "f.json").read_text())
    assert figures["weights"] == {"reference": 1, "feedback": pytest.approx(0.8), "consensus": 0.5}


@pytest.mark.process
def test_a_truncated_file_imports_nothing(tmp_path: Path, lines: Path) -> None:
    content = lines.read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(content[: len(content) // 2])
    done = autotts("import", "jsonl", "lines.jsonl", "cut.jsonl", "--store", "s.db", folder=tmp_path)
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "cut.jsonl:" in done.stderr
    assert not (tmp_path / "s.db").exists()
