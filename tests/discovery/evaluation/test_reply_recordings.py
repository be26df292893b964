"""Recordings of whole replies: replayed without probes, searched, and judged by the gate."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from controllers import TO_END, Advanced, IllegalAction, Limits, State, advance, branch, probe, run_sync
from controllers.advice import uses_probes
from controllers.loading import Spec, parse_spec
from discovery.answers import is_redacted
from discovery.answers.structured import (
    InvalidJson,
    ToolSchemas,
    calls_class,
    canonical_text,
    class_of_calls,
    class_of_document,
    document_class,
    no_call_class,
    parse_json,
    with_defaults,
)
from discovery.data.importers import format_recording_line, parse_recording_line, read_jsonl
from discovery.data.recordings import (
    Cell,
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    intern_answers,
    question_id,
    question_text,
)
from discovery.errors import BadRecording, RecordingsNotFound
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import Evaluation
from discovery.evaluation.replay import ReplayEnvironment
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.search.cascade import Cascade, CascadePlan
from discovery.search.explorers import Candidate, ExplorerContext, ScoredCandidate
from discovery.search.explorers.agent import PAGES
from discovery.search.explorers.controller_writer import emit
from discovery.search.explorers.genome import PARTS, PARTS_WITHOUT_PROBES, genome_of, may_probe
from discovery.search.explorers.grammar import Grammar
from discovery.search.fixed_recordings import fixed_recordings
from discovery.search.history import History
from discovery.search.loop import SearchLimits, SearchLoop, baselines
from discovery.search.prompt import join_blocks, render
from discovery.search.trial_pool import TrialPool
from discovery.store import Store
from tests.discovery.evaluation.test_evaluate import Given, autotts

RIGHT: Final = class_of_document('{"answer": 7}', None)
SCHEMA: Final = {"properties": {"unit": {"default": "C"}}}


def replies(number: int, branches: int = 32, split: Split = Split.SEARCH, **changes: Any) -> RecordedQuestion:
    """Return a question with whole replies, of which three fifths say 7 and the others something else each."""
    rng = np.random.default_rng(number)
    recorded = []
    for at in range(branches):
        final = RIGHT if rng.random() < 0.6 else class_of_document(json.dumps({"answer": 100 + at}), None)
        recorded.append(RecordedBranch([], int(rng.integers(20, 400)), final, []))
    about: dict[str, Any] = {
        "reference": RIGHT,
        "interval": 100,
        "split": split,
        "sampling": {"branch": "reply", "answer": "json"},
        "origin": Origin.COLLECTED,
    }
    return RecordedQuestion(question_id(f"{split} {number}"), "m", "json", branches=recorded, **(about | changes))


# Classes of votes


def test_votes_have_one_class_however_they_are_written() -> None:
    written = class_of_document('{"b": 1.50, "a": [1]}', None)
    assert is_redacted(written)
    assert written == class_of_document('{"a":[1e0],"b":15e-1}', None)
    assert written == document_class(canonical_text(with_defaults(parse_json('{"a":[1],"b":1.5}'), None)))
    assert class_of_document('{"city":"Rome"}', SCHEMA) == class_of_document('{"unit":"C","city":"Rome"}', SCHEMA)
    different = ["{}", '{"a":"Rome"}', '{"a":"rome"}', '{"a":"ro me"}', '{"a":["ro","me"]}', "7", '"7"']
    assert len({class_of_document(text, None) for text in different}) == len(different)


def test_calls_have_one_class_in_any_order_and_with_defaults() -> None:
    tools = {"weather": SCHEMA, "time": None}
    read = ToolSchemas(tools).read([("time", ""), ("weather", '{"city":"Rome","unit":"C"}')])
    assert read is not None
    reference = '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time", "arguments": {}}]'
    assert class_of_calls(reference, tools) == calls_class(read)
    assert class_of_calls('{"name": "time", "arguments": "{}"}', tools) == class_of_calls(
        '[{"name": "time", "arguments": {}}]', tools
    )
    assert class_of_calls("[]", tools) == no_call_class() != class_of_calls(reference, tools)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("weather(Rome)", "expected value"),
        ('{"weather": {}}', "must be a list of calls"),
        ('[{"name": "weather", "arguments": {}, "id": 1}]', "must be a list of calls"),
        ('[{"name": "nobody", "arguments": {}}]', "not among the question's tools"),
        ('[{"name": "weather", "arguments": "{"}]', "not valid JSON"),
    ],
)
def test_a_reference_that_is_no_list_of_calls_is_refused(reference: str, problem: str) -> None:
    with pytest.raises((ValueError, InvalidJson), match=problem):
        class_of_calls(reference, {"weather": None})


def test_tools_and_formats_belong_to_the_question() -> None:
    asked = [{"role": "user", "content": "hi"}]
    assert question_text(asked) == question_text(asked, {"temperature": 1, "tools": [], "tool_choice": None}) == "hi"
    texts = {question_text(asked, {"tools": [{"type": "function", "function": {"name": name}}]}) for name in "ab"}
    assert len(texts) == 2
    assert all(json.loads(text)["messages"] == asked for text in texts)


# Formats


async def test_recordings_keep_their_kind_in_files_and_in_the_store(tmp_path: Path) -> None:
    recorded = replies(1, branches=3)
    assert not recorded.has_probes
    line = format_recording_line(recorded)
    assert json.loads(line)["branches"][0] == {
        "probes": [],
        "tokens": recorded.branches[0].tokens,
        "final": recorded.branches[0].final,
    }
    read = parse_recording_line(line.encode()).recorded()
    assert replace(read, branches=list(read.branches)) == recorded
    (tmp_path / "lines.jsonl").write_text(line)
    async with Store.open(tmp_path / "store.db", create=True) as store:
        await store.add(read_jsonl(tmp_path / "lines.jsonl"))
        (loaded,) = await store.load(recorded.cell)
        assert not (await store.verify()).bad
    assert (list(loaded.branches), loaded.has_probes, loaded.version) == (recorded.branches, False, recorded.version)


def test_replies_with_probes_are_refused() -> None:
    line = json.loads(format_recording_line(replies(1, branches=1)))
    line["branches"][0]["probes"] = ["7"]
    with pytest.raises(BadRecording, match="have no probes; leave probes empty"):
        parse_recording_line(json.dumps(line).encode())


# Replay


def test_a_reply_runs_its_intervals_and_cannot_be_probed() -> None:
    lengths = [250, 300, 40]
    recorded = replies(1, branches=3)
    branches = [branch._replace(tokens=length) for branch, length in zip(recorded.branches, lengths, strict=True)]
    recording = intern_answers(replace(recorded, branches=branches))
    environment = ReplayEnvironment(recording, range(3))
    state = State(Limits(100, 3, has_probes=False, has_pauses=False))

    def play(*actions: Any) -> list[Advanced]:
        state.check(actions)
        facts = list(run_sync(environment.execute(actions)))
        state.apply(actions, facts)
        return facts  # type: ignore[return-value]

    first = play(branch(), branch(TO_END), branch())
    assert [(fact.intervals, fact.tokens, fact.finished) for fact in first] == [
        (1, 100, False),
        (3, 300, True),
        (1, 40, True),
    ]
    with pytest.raises(IllegalAction, match="has_probes"):
        state.check([probe(0)])
    (last,) = play(advance(0, 2))
    assert (last.intervals, last.tokens, last.finished) == (2, 150, True)
    assert state.spent == sum(lengths)


@pytest.mark.process
def test_controllers_are_scored_on_replies_and_their_limits_say_so() -> None:
    seen = 'from controllers import answer, branch, TO_END\n\n\nclass C:\n    """Ask."""\n\n    '
    seen += "def __init__(self, beta):\n        pass\n\n    def decide(self, state):\n        "
    seen += "if state.limits.has_probes or state.limits.has_pauses:\n            return [answer(None)]\n        "
    seen += "return [answer(state.leader())] if state.width else [branch(TO_END) for _ in range(9)]\n"
    source = Given(*(replies(number) for number in range(30)))
    specs = [parse_spec("single"), parse_spec("self_consistency@16"), Spec("reads_limits", seen)]
    rules = ReplayRules(max_branches=32)
    scores = Evaluation(source, source.cells(), specs, [1.0], 4, rules=rules).run(make_engine(EngineName.LOCAL, 1))
    single, voted, reads_limits = (score.accuracy for score in scores)
    assert [score.failures for score in scores] == [[], [], []]
    assert 50 < single < 70
    assert reads_limits > single + 10
    assert voted > 95


@pytest.mark.parametrize("name", ["cmc", "parallel_probe"])
def test_a_controller_that_probes_is_refused(name: str) -> None:
    source = Given(replies(1))
    evaluation = Evaluation(source, source.cells(), [parse_spec(name)], [1.0], 1)
    with pytest.raises(RecordingsNotFound, match=f"{name} probes, and the branches of m json search are whole"):
        evaluation.run(make_engine(EngineName.LOCAL, 1))


# Search


def test_components_without_probes_are_those_whose_controllers_do_not_probe() -> None:
    removed = {part: sorted(PARTS[part].keys() - PARTS_WITHOUT_PROBES[part].keys()) for part in PARTS}
    assert {part: names for part, names in removed.items() if names} == {
        "prune": ["deviant", "unstable"],
        "weight": ["probe"],
        "pool": ["all"],
        "depth": ["horizon"],
        "pace": ["lead"],
    }
    for part, names in PARTS.items():
        for name in names:
            genome = genome_of({part: name})
            assert may_probe(genome) == uses_probes(emit(genome)), (part, name)
    for first, second in itertools.combinations(PARTS_WITHOUT_PROBES, 2):
        for one, other in itertools.product(PARTS_WITHOUT_PROBES[first], PARTS_WITHOUT_PROBES[second]):
            assert not uses_probes(emit(genome_of({first: one, second: other})))


@pytest.mark.parametrize("varied", [0, 20])
def test_the_grammar_proposes_no_probes_where_there_are_none(varied: int) -> None:
    standings: list[ScoredCandidate] = []
    rng, kinds = random.Random(3), set()
    for step in range(1, 8):
        batch = Grammar(batch=4, varied=varied).propose(ExplorerContext(1, step, standings, has_probes=False))
        assert batch
        for candidate in batch:
            assert not uses_probes(candidate.source), candidate.note
            assert not may_probe(candidate.genome)
            kinds.add(candidate.note)
        standings += [ScoredCandidate(candidate, round(rng.uniform(40, 60), 2)) for candidate in batch]
    assert len(kinds) > 10


def test_explorers_are_told_and_baselines_that_probe_are_left_out() -> None:
    assert "cmc" in {candidate.name for candidate in baselines()}
    assert {candidate.name for candidate in baselines(has_probes=False)} == {
        *("adaptive_consistency", "short_m_at_k", "self_consistency", "asc")
    }
    for has_probes in (True, False):
        context = ExplorerContext(1, 1, [], has_probes=has_probes)
        for told in (render(context)[1]["content"], join_blocks(PAGES["CONSTRAINTS.md"], context)):
            assert ("`state.limits.has_probes` is false" in told) is not has_probes


class _Given:
    """Explorer that proposes one batch."""

    name = "given"

    def __init__(self, *batch: Candidate) -> None:
        self.batch = batch
        self.seen: list[ExplorerContext] = []

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        self.seen.append(context)
        return list(self.batch) if context.step == 1 else []


@pytest.mark.process
def test_the_cascade_tries_only_candidates_without_probes(tmp_path: Path) -> None:
    cells = {Cell("m", "json", Split.SEARCH): [intern_answers(replies(number)) for number in range(6)]}
    probing = Candidate("probing", emit(genome_of({"pool": "all"})), "given")
    plain = Candidate("plain", emit(genome_of({"stop": "lead"})), "given")
    explorer = _Given(probing, plain)
    with TrialPool(cells, ReplayRules(), 1) as arena, TrialPool(fixed_recordings(), ReplayRules(), 1) as fixed:
        cascade = Cascade(arena, fixed, CascadePlan(betas=(0.0, 1.0), shuffles=1, few=1))
        run = SearchLoop(explorer, cascade, History.begin(tmp_path / "record.jsonl", {}), 0)
        run.search(SearchLimits(rounds=1))
    failures = {candidate.name: verdict.failure for candidate, verdict in run.pairs}
    assert "state.limits.has_probes is false" in failures.pop("probing")
    assert set(failures.values()) == {""}, failures
    assert "cmc" not in failures
    assert [context.has_probes for context in explorer.seen] == [False]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("runner", ["--no-kernel", "--kernel"])
def test_discover_and_gate_run_on_recordings_of_replies(runner: str, tmp_path: Path) -> None:
    if runner == "--kernel":
        pytest.importorskip("numba", reason="numba is not installed")
    recorded = [replies(number, split=split) for split in (Split.SEARCH, Split.HELD_OUT) for number in range(12)]
    (tmp_path / "lines.jsonl").write_text("".join(map(format_recording_line, recorded)))
    asked = ("--recordings", "lines.jsonl", "--rounds", "2", "--shuffles", "2", "--workers", "1", "--out", "run")
    done = autotts("discover", runner, *asked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    tried = [
        candidate
        for body in History.read(tmp_path / "run" / "history.jsonl").bodies("proposed")
        for candidate in body["candidates"]
    ]
    assert len(tried) > 10
    assert [candidate["name"] for candidate in tried if uses_probes(candidate["source"])] == []
    (file,) = (tmp_path / "run").glob("*.py")
    options = ("--recordings", "lines.jsonl", "--ledger", "gate.jsonl", "--shuffles", "2", "--workers", "1")
    done = autotts("gate", str(file), "--champion", "single", *options, folder=tmp_path)
    assert done.returncode in (0, 1), done.stderr
    assert f"{file.stem}: " in done.stdout
    done = autotts("gate", "cmc", "--champion", "single", *options, folder=tmp_path)
    assert (done.returncode, "whole replies, which have no probes" in done.stderr) == (2, True), done.stderr
    done = autotts("discover", runner, *asked[:-1], "other", "--champions", "cmc", folder=tmp_path)
    assert (done.returncode, "--champions cmc: needs probes" in done.stderr) == (2, True), done.stderr
