"""Environment of a live request: executes a controller's rounds on vLLM.

A round is sent in as few calls as possible. Branches that advance by the same number of tokens share a call, and so do
all probes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from controllers import TO_END, Action, Advanced, Fact, Probed, Verb
from controllers.signals import NO_SIGNALS, Signal
from discovery.answers import VOTABLE_TYPES, Answer, Labels
from proxy.environment.answer_reader import Grader, PlainGrader
from proxy.environment.branch_answers import BranchAnswers
from proxy.environment.branch_generator import BranchGenerator
from proxy.environment.branch_signals import UNKNOWN, fact_signals, probe_confidence, signals_by_interval
from proxy.environment.past_suffixes import PastSuffixes
from proxy.environment.stop_strings import StopStrings
from proxy.environment.token_meter import TokenMeter
from proxy.environment.votability import VotabilityState
from proxy.environment.votability_check import VotabilityCheck
from proxy.token_ids import Context
from proxy.types import Call, EnvironmentLimits, IntervalSignals, LiveBranch, Output, Prompt
from proxy.upstream.fleet.interface import Upstream


class SentBytesExceeded(Exception):
    """The request has sent the upstream as many bytes as the limit allows."""


class _Step(NamedTuple):
    """One action that is being executed, and its output."""

    action: Action
    branch: int
    output: Output
    max_tokens: int
    revealed: int = 0  # tokens of this step that had been generated ahead


class _ActionResult(NamedTuple):
    """The result of an action before its answer is read. Labels are numbered in the order of actions."""

    action: Action
    branch: int
    intervals: int
    tokens: int
    probe: Output | None  # output of a probe
    finished: bool
    end: int = 0  # the branch's tokens after the action


class LiveEnvironment:
    """Implements `controllers.Environment` over an Upstream. One object serves one request.

    `execute` raises UpstreamError. After it fails or is cancelled, `salvage` keeps what had been generated.
    With `keeps_all_branches`, every branch is run to its end, even if it has no answer, for recordings and benchmarks.
    Facts have the given `signals`, which cost the upstream work; others are None.
    """

    def __init__(
        self,
        engine: Upstream,
        prompt: Prompt,
        limits: EnvironmentLimits,
        grader: Grader | None = None,
        *,
        keeps_all_branches: bool = False,
        signals: frozenset[Signal] = NO_SIGNALS,
    ) -> None:
        self.prompt = prompt
        self.limits = limits
        self.signals = signals
        self.branches: list[LiveBranch] = []
        self.cutoff: str | None = None  # see `record_cutoff`
        self._votability = VotabilityState(
            votable=prompt.kind.is_declared_votable, confirmed=prompt.kind.is_declared_votable
        )
        self._generator = BranchGenerator(engine, prompt, limits, self._votability, signals)
        self._answers = BranchAnswers(self._generator, grader or PlainGrader())
        self._suffixes = PastSuffixes(self._generator, self.branches)
        self._check = VotabilityCheck(self._generator, self._answers, self._votability, ends_early=True)
        if keeps_all_branches:
            self._check.accept()

    @property
    def engine(self) -> Upstream:
        """The upstream that generates the branches."""
        return self._generator.engine

    @property
    def meter(self) -> TokenMeter:
        """Tokens and requests that the upstream has spent on this request."""
        return self._generator.meter

    @property
    def stops(self) -> StopStrings:
        """The client's stop strings."""
        return self._generator.stops

    @property
    def grader(self) -> Grader:
        """The grader that reads and compares answers."""
        return self._answers.grader

    @property
    def labels(self) -> Labels:
        """The answers behind the labels."""
        return self._answers.labels

    @property
    def votable(self) -> bool:
        """Whether the task can be voted on, according to the check so far."""
        return self._votability.votable

    @property
    def own_probe_tokens(self) -> int:
        """Tokens of probes that no controller asked for."""
        return self._answers.own_probe_tokens

    def record_cutoff(self, reason: str) -> None:
        """Record why the proxy, not the controller, ended the episode. The store has it as `refused`."""
        self.cutoff = reason

    def continue_in_background(self, engine: Upstream, priority: int) -> None:
        """Prepare to complete branches after the answer has gone out, on `engine` and with this priority.

        The task then counts as votable, and the byte limit does not apply. A larger priority is served later.
        """
        self._check.accept()
        self._generator.move_to(engine, priority)

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        most, generator = self.limits.sent_bytes, self._generator
        if most is not None and not generator.is_background and generator.meter.sent_bytes > most:
            raise SentBytesExceeded
        results: dict[int, _ActionResult] = {}
        with generator.engine.observer.round(actions):
            await self._check.before_opening(self.branches, sum(action.verb is Verb.BRANCH for action in actions))
            for phase in _phases(actions, len(self.branches)):
                await self._run_phase(phase, results)
        return [await self._fact(results[i]) for i in sorted(results)]

    def salvage(self) -> None:
        """Append to the branches the outputs generated ahead and the partial outputs of aborted calls."""
        unopened = self._check.take_unopened()
        if unopened is not None:
            self.branches.append(unopened)
        for branch in self.branches:
            while branch.ahead:
                self._grow(branch, branch.ahead.popleft())
        for branch, output in self._generator.take_in_flight():
            self._grow(branch, output)

    def discard_in_flight(self) -> None:
        """Drop the partial outputs of aborted calls, so that `salvage` does not add them."""
        self._generator.take_in_flight()

    async def number(self, answer: Answer | None, labels: Labels | None = None) -> int | None:
        """Return the label of an answer among `labels`, by default those of the request."""
        return await self._answers.number(answer, labels)

    async def read_finished(self, index: int) -> None:
        """Read the answer of a finished branch, unless it has been read. May raise UpstreamError."""
        await self._answers.of_finished(self.branches[index])

    async def suffix(self, index: int, *, lead: bool) -> list[int]:
        """Return ids that close branch `index`'s thought and, with `lead`, begin its answer."""
        return await self._generator.suffix(self.branches[index].text, lead=lead)

    async def extend(self, index: int, suffix: Sequence[int], max_tokens: int, sampling: Mapping[str, Any]) -> Output:
        """Generate a continuation of branch `index` and `suffix`, and return it. The branch is not changed."""
        context = self._generator.context(self.branches[index]).followed_by(suffix)
        return await self._generator.generate_one(context, max_tokens, sampling, suffix=len(suffix))

    async def probe_at(
        self, points: Sequence[tuple[int, int]], labels: Mapping[int, Labels] | None = None
    ) -> list[Probed]:
        """Probe branches at earlier points. `points` are pairs of a branch and a number of whole intervals.

        With `labels`, answers are numbered among the labels given for their branch, instead of those of the request.
        """
        contexts: list[list[int]] = []
        suffixes: list[list[int]] = []
        for index, intervals in points:
            ids = self.branches[index].ids[: intervals * self.limits.interval]
            suffixes.append(await self._suffixes.at(index, intervals))
            contexts.append([*self.prompt.ids, *ids, *suffixes[-1]])
        call = self._generator.probe_call(contexts, sum(map(len, suffixes)))
        await self._generator.generate(call)
        self._answers.own_probe_tokens += call.suffix_tokens + call.generated
        probes = []
        for (index, _), suffix, output in zip(points, suffixes, call.outputs, strict=True):
            answer = await self._answers.of_probe(output)
            label = await self.number(answer, None if labels is None else labels[index])
            probes.append(self._probed(index, label, len(suffix), output))
        return probes

    def interval_signals(self, index: int, tokens: int) -> Sequence[IntervalSignals]:
        """Return the signals of each interval in the first `tokens` tokens of branch `index`, if asked for."""
        if Signal.INTERVALS not in self.signals:
            return ()
        return signals_by_interval(self.branches[index], self.limits.interval, tokens)

    # Phases: at most one action per branch, all executed concurrently

    async def _run_phase(self, phase: Sequence[tuple[int, Action, int]], results: dict[int, _ActionResult]) -> None:
        steps: dict[int, _Step] = {}
        suffixes: dict[int, list[int]] = {}
        for position, action, index in phase:
            if action.verb is Verb.BRANCH:
                self.branches.append(self._check.take_unopened() or LiveBranch())
            if action.verb is Verb.PRUNE:
                continue
            branch = self.branches[index]
            if branch.finish is not None:  # finished earlier in this round
                results[position] = _ActionResult(action, index, 0, 0, None, True)
                continue
            if action.verb is Verb.PROBE:
                if not self.prompt.kind.is_probeable:
                    results[position] = _ActionResult(action, index, 0, 0, None, False)
                    continue
                suffixes[index] = await self.suffix(index, lead=True)
                steps[position] = _Step(action, index, Output(), self.limits.probe)
                continue
            revealed = self._reveal(branch, action.intervals)
            intervals = action.intervals if action.intervals == TO_END else action.intervals - self._intervals(revealed)
            max_tokens = min(intervals * self.limits.interval, self.limits.branch - len(branch.ids))
            if branch.finish is not None or max_tokens <= 0:
                results[position] = self._advanced(action, index, revealed)
                continue
            steps[position] = _Step(action, index, Output(), max_tokens, revealed)
        while steps:
            calls = list(self._calls(steps.values(), suffixes))
            owners = [
                (None if step.action.verb is Verb.PROBE else self.branches[step.branch], step.output)
                for step in steps.values()
            ]
            await self._generator.generate_all(calls, owners)
            sent, steps = steps, {}
            for position, step in sent.items():
                rest = self._append_output(step)
                if rest is None:
                    results[position] = self._result(step, suffixes)
                else:
                    steps[position] = rest
        await self._check.check_cut(self.branches)

    def _reveal(self, branch: LiveBranch, intervals: int) -> int:
        """Append to `branch` up to `intervals` intervals generated ahead. Returns the number of tokens."""
        known = len(branch.ids)
        while branch.ahead and intervals > 0 and branch.finish is None:
            self._grow(branch, branch.ahead.popleft())
            intervals -= 1
        return len(branch.ids) - known

    def _intervals(self, tokens: int) -> int:
        return -(-tokens // self.limits.interval)

    def _calls(self, steps: Iterable[_Step], suffixes: Mapping[int, list[int]]) -> Iterable[Call]:
        """Yield the calls that execute `steps`. The output of each step is an output of one of the calls."""
        groups: dict[tuple[bool, bool, int, bool, bool], list[_Step]] = defaultdict(list)
        for step in steps:
            branch, most = self.branches[step.branch], step.max_tokens
            is_probe = step.action.verb is Verb.PROBE
            if not is_probe:
                most = self.stops.max_tokens(branch.text, self.limits.interval, most)
            stops = not is_probe and bool(self.stops.at_server(branch.text))
            is_greedy = not is_probe and self._generator.is_greedy(step.branch)
            groups[is_probe, not is_probe and not branch.ids, most, stops, is_greedy].append(step)
        for (is_probe, is_opening, most, *_), group in groups.items():
            text = self.branches[group[0].branch].text  # all branches of a group get the same stop strings
            if is_probe:
                prompts = [self._context(step).followed_by(suffixes[step.branch]) for step in group]
                suffix_tokens = sum(len(suffixes[step.branch]) for step in group)
                yield _connect_outputs(self._generator.probe_call(prompts, suffix_tokens), group)
            elif self.prompt.seed is not None:
                for step in group:
                    sampling = self._generator.sampling(text, step.branch, self.branches[step.branch].pieces)
                    yield self._with_check(self._generator.branch_call([self._context(step)], most, sampling), [step])
            else:
                sampling = self._generator.sampling(text, group[0].branch)
                if is_opening:
                    call = self._generator.branch_call([self._context(group[0])], most, sampling, n=len(group))
                else:
                    call = self._generator.branch_call([self._context(step) for step in group], most, sampling)
                yield self._with_check(call, group)

    def _context(self, step: _Step) -> Context:
        return self._generator.context(self.branches[step.branch])

    def _with_check(self, call: Call, steps: Sequence[_Step]) -> Call:
        """Connect a call with its steps, and check votability when the first branch finishes.

        Otherwise the check would wait for the end of the round.
        """
        _connect_outputs(call, steps)
        texts = {id(step.output): self.branches[step.branch].text for step in steps}

        async def check(output: Output) -> None:
            if output.finish == "stop" and output.ended_by_token:  # others are checked when the phase ends
                await self._check.check_finished(texts[id(output)] + output.text)

        call.on_finish = check
        return call

    # Results

    def _append_output(self, step: _Step) -> _Step | None:
        """Append a step's output to its branch. Returns the rest of the step, or None if it is done."""
        if step.action.verb is Verb.PROBE:
            return None
        branch, tokens = self.branches[step.branch], len(step.output.ids)
        self._grow(branch, step.output)
        if branch.finish is not None or tokens >= step.max_tokens:
            return None
        return _Step(step.action, step.branch, Output(), step.max_tokens - tokens, step.revealed + tokens)

    def _result(self, step: _Step, suffixes: Mapping[int, list[int]]) -> _ActionResult:
        """Return the result of a step that is done."""
        tokens = len(step.output.ids)
        if step.action.verb is Verb.PROBE:
            return _ActionResult(step.action, step.branch, 0, tokens + len(suffixes[step.branch]), step.output, False)
        return self._advanced(step.action, step.branch, step.revealed + tokens)

    def _advanced(self, action: Action, index: int, tokens: int) -> _ActionResult:
        branch = self.branches[index]
        intervals, is_finished = max(1, self._intervals(tokens)), branch.finish is not None
        return _ActionResult(action, index, intervals, tokens, None, is_finished, len(branch.ids))

    def _grow(self, branch: LiveBranch, output: Output) -> None:
        """Append `output` to `branch`, and mark the branch as finished if that ends it."""
        known = len(branch.text)
        branch.ids += output.ids
        branch.text += output.text
        branch.log_probabilities += output.log_probabilities
        branch.pieces += 1
        if output.finish == "stop":
            branch.finish, branch.ended_by_stop_string = "stop", not output.ended_by_token
        cut = self.stops.cut(branch.text, known)
        if cut is not None:
            branch.text, branch.finish, branch.ended_by_stop_string = branch.text[:cut], "stop", True
        if branch.finish != "stop" and len(branch.ids) >= self.limits.branch:
            branch.finish = "length"  # cut mid-thought, so it has no answer

    async def _fact(self, result: _ActionResult) -> Fact:
        branch = self.branches[result.branch]
        if result.finished:
            label = branch.label = await self.number(await self._answers.of_finished(branch))
        else:
            answer = None if result.probe is None else await self._answers.of_probe(result.probe)
            if answer is not None and answer.form.type in VOTABLE_TYPES:
                self._votability.probe_answered = self._votability.controller_probed = True
            label = await self.number(answer)
        if result.action.verb is Verb.PROBE:
            if result.probe is None:
                return Probed(result.branch, label, result.tokens)
            return self._probed(result.branch, label, result.tokens - len(result.probe.ids), result.probe)
        confidence, lowest = UNKNOWN
        if Signal.INTERVALS in self.signals and result.tokens:
            confidence, lowest = fact_signals(branch, self.limits.interval, result.end - result.tokens, result.end)
            await asyncio.sleep(0)  # a branch may have thousands of tokens, and a round many branches
        return Advanced(result.branch, result.intervals, result.tokens, result.finished, label, confidence, lowest)

    def _probed(self, index: int, label: int | None, suffix_tokens: int, output: Output) -> Probed:
        """Return the fact of a probe. Only an answer that could be read has a confidence."""
        is_known = Signal.PROBES in self.signals and label is not None
        confidence = probe_confidence(output, self.prompt.template) if is_known else None
        return Probed(index, label, suffix_tokens + len(output.ids), confidence)


def _phases(actions: Sequence[Action], width: int) -> list[list[tuple[int, Action, int]]]:
    """Split a round into phases of at most one action per branch. An entry is (position, action, branch).

    `width` is the number of branches before the round.
    """
    phases: list[list[tuple[int, Action, int]]] = []
    count: dict[int, int] = defaultdict(int)
    for position, action in enumerate(actions):
        if action.verb is Verb.ANSWER:
            continue
        index = action.branch
        if action.verb is Verb.BRANCH:
            index = width
            width += 1
        if count[index] == len(phases):
            phases.append([])
        phases[count[index]].append((position, action, index))
        count[index] += 1
    return phases


def _connect_outputs(call: Call, steps: Sequence[_Step]) -> Call:
    """Set the outputs of `call` to the outputs of `steps`, in order, and return `call`."""
    call.outputs = [step.output for step in steps]
    return call
