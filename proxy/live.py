"""The environment of a live request: its branches, run on vLLM.

A round goes out in as few requests as can be: all branches that run equally long share one, all probes share another.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from controllers import Action, Advanced, Fact, Probed, Verb
from discovery.answers import Kind, read
from proxy import probing
from proxy.engine import Call, Engine, Output


class Prompt(NamedTuple):
    """What a request asks, ready for the engine."""

    model: str
    ids: Sequence[int]
    tail: str  # the end of its text, to see whether the template opened a thought
    sampling: Mapping[str, Any]  # of its branches, without seed and stop
    stop: Sequence[str] = ()
    seed: int | None = None
    kind: Kind = Kind.AUTO


class Sizes(NamedTuple):
    """Token bounds of the request's branches and probes."""

    interval: int
    branch: int  # the most a branch may grow to
    probe: int  # the most a probe may generate


@dataclass(slots=True)
class LiveBranch:
    """A branch's own text; what the controller knows of it is in State."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    pieces: int = 0  # requests it was generated in
    finish: str | None = None  # "stop", "length", or None while it runs
    answer: str | None = None  # the canonical answer its text gives, once finished


@dataclass(slots=True)
class Meter:
    """What the upstream did for one request, by its own usage."""

    requests: int = 0
    prompt_tokens: int = 0  # context re-sent with every request included
    cached_tokens: int | None = None  # of these, known to come from the prefix cache; None if the server does not say
    first_cached: int | None = None  # tokens of the prompt that were cached when the request came
    generated_tokens: int = 0
    suffix_tokens: int = 0  # prompt tokens of our own making: what probes append
    aborted_tokens: int = 0  # generated in requests that were cut, as far as seen

    @property
    def billed(self) -> int:
        """All the request made the upstream do beyond reading the prompt."""
        return self.generated_tokens + self.suffix_tokens + self.aborted_tokens

    def add(self, call: Call) -> None:
        """Take in a call that ended well."""
        if self.requests == 0:
            self.first_cached = call.cached_tokens
        self.requests += 1
        self.prompt_tokens += call.prompt_tokens
        self.generated_tokens += sum(len(output.ids) for output in call.outputs)
        if call.cached_tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + call.cached_tokens


class _Step(NamedTuple):
    """One action on its way: where its output lands."""

    action: Action
    branch: int
    output: Output
    most: int  # tokens it may generate


class LiveEnvironment:
    """Implements `controllers.Environment` over an Engine. One object serves one request.

    `execute` raises UpstreamError. When it fails or is cancelled, `salvage` keeps what had already been generated.
    """

    def __init__(self, engine: Engine, prompt: Prompt, sizes: Sizes) -> None:
        self.engine = engine
        self.prompt = prompt
        self.sizes = sizes
        self.branches: list[LiveBranch] = []
        self.answers: list[str] = []  # canonical answer of each label
        self.meter = Meter()
        self._numbers: dict[str, int] = {}
        self._flying: list[_Step] = []

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        facts: dict[int, _Outcome] = {}
        for phase in _phases(actions, len(self.branches)):
            await self._run(phase, facts)
        return [self._fact(facts[i]) for i in sorted(facts)]

    def salvage(self) -> int:
        """Append to the branches what requests that were cut had generated; returns how many tokens that was."""
        salvaged = 0
        for step in self._flying:
            salvaged += len(step.output.ids)
            if step.action.verb is not Verb.PROBE:
                self._grow(self.branches[step.branch], step.output)
        self._flying.clear()
        self.meter.aborted_tokens += salvaged
        return salvaged

    async def suffix(self, index: int, *, lead: bool) -> list[int]:
        """Ids that close branch `index`'s thought and, with `lead`, lead into its answer."""
        text = self.branches[index].text
        make = probing.suffix if lead else probing.closing
        return await self.engine.tokenise_suffix(self.prompt.model, make(self.prompt.tail, text))

    async def extend(self, index: int, suffix: Sequence[int], most: int, sampling: Mapping[str, Any]) -> Output:
        """What follows branch `index` and `suffix`, outside the branch's own text."""
        call = Call([[*self.prompt.ids, *self.branches[index].ids, *suffix]], most, sampling)
        await self.engine.generate(self.prompt.model, call)
        self.meter.add(call)
        self.meter.suffix_tokens += len(suffix)
        return call.outputs[0]

    # One phase: at most one action a branch, all at once

    async def _run(self, phase: Sequence[tuple[int, Action, int]], facts: dict[int, _Outcome]) -> None:
        steps: dict[int, _Step] = {}
        suffixes: dict[int, list[int]] = {}
        for position, action, index in phase:
            if action.verb is Verb.BRANCH:
                self.branches.append(LiveBranch())
            if action.verb is Verb.PRUNE:
                continue
            if self.branches[index].finish is not None:  # finished earlier in this round
                facts[position] = _Outcome(action, index, 0, 0, self.branches[index].answer, True)
                continue
            if action.verb is Verb.PROBE:
                suffixes[index] = await self.suffix(index, lead=True)
            steps[position] = _Step(action, index, Output(), self._most(action, index))
        calls = list(self._calls(steps.values(), suffixes))
        self._flying = list(steps.values())
        await self._gather(calls)
        self._flying = []
        self.meter.suffix_tokens += sum(map(len, suffixes.values()))
        for position, step in steps.items():
            facts[position] = self._land(step, suffixes)

    def _most(self, action: Action, index: int) -> int:
        if action.verb is Verb.PROBE:
            return self.sizes.probe
        room = self.sizes.branch - len(self.branches[index].ids)
        return min(action.intervals * self.sizes.interval, room)

    def _calls(self, steps: Iterable[_Step], suffixes: Mapping[int, list[int]]) -> Iterable[Call]:
        """The requests that carry `steps`, each step's output wired to its place in one of them."""
        groups: dict[tuple[bool, bool, int], list[_Step]] = defaultdict(list)
        for step in steps:
            is_probe = step.action.verb is Verb.PROBE
            groups[is_probe, step.action.verb is Verb.BRANCH, step.most].append(step)
        for (is_probe, opening, most), group in groups.items():
            if is_probe:
                prompts = [self._context(step.branch) + suffixes[step.branch] for step in group]
                yield _wire(Call(prompts, most, probing.sampling()), group)
            elif self.prompt.seed is not None:
                for step in group:
                    yield _wire(Call([self._context(step.branch)], most, self._sampling(step)), [step])
            elif opening:
                yield _wire(Call([self.prompt.ids], most, self._sampling(), n=len(group)), group)
            else:
                prompts = [self._context(step.branch) for step in group]
                yield _wire(Call(prompts, most, self._sampling()), group)

    def _context(self, index: int) -> list[int]:
        return [*self.prompt.ids, *self.branches[index].ids]

    def _sampling(self, step: _Step | None = None) -> dict[str, Any]:
        """A shared request carries no seed: vLLM would give every prompt of it the same one, and equal branches."""
        sampling = dict(self.prompt.sampling)
        if self.prompt.stop:
            sampling["stop"] = list(self.prompt.stop)
        if step is not None and self.prompt.seed is not None:
            sampling["seed"] = _derive(self.prompt.seed, step.branch, self.branches[step.branch].pieces)
        return sampling

    async def _gather(self, calls: Sequence[Call]) -> None:
        """Run `calls` at once; the first to fail cancels the others and its error is raised."""
        tasks = [asyncio.create_task(self.engine.generate(self.prompt.model, call)) for call in calls]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for call in calls:
            self.meter.add(call)

    # What came of it

    def _land(self, step: _Step, suffixes: Mapping[int, list[int]]) -> _Outcome:
        tokens = len(step.output.ids)
        if step.action.verb is Verb.PROBE:
            answer = probing.read_probe(step.output.text, self.prompt.kind)
            return _Outcome(step.action, step.branch, 0, tokens + len(suffixes[step.branch]), answer, False)
        branch = self.branches[step.branch]
        self._grow(branch, step.output)
        intervals = max(1, -(-tokens // self.sizes.interval))
        return _Outcome(step.action, step.branch, intervals, tokens, branch.answer, branch.finish is not None)

    def _grow(self, branch: LiveBranch, output: Output) -> None:
        known = len(branch.text)
        branch.ids += output.ids
        branch.text += output.text
        branch.pieces += 1
        if output.finish == "stop":
            branch.finish = "stop"
        cut = _first(self.prompt.stop, branch.text, known)
        if cut is not None:  # a stop string across two requests, which the server cannot see
            branch.text, branch.finish = branch.text[:cut], "stop"
        if branch.finish == "stop":
            branch.answer = read(branch.text, self.prompt.kind)
        elif len(branch.ids) >= self.sizes.branch:
            branch.finish = "length"  # cut mid-thought: it answers nothing

    def _fact(self, outcome: _Outcome) -> Fact:
        label = self._label(outcome.answer)
        if outcome.action.verb is Verb.PROBE:
            return Probed(outcome.branch, label, outcome.tokens)
        return Advanced(outcome.branch, outcome.intervals, outcome.tokens, outcome.finished, label)

    def _label(self, answer: str | None) -> int | None:
        if answer is None:
            return None
        if answer not in self._numbers:
            self._numbers[answer] = len(self.answers)
            self.answers.append(answer)
        return self._numbers[answer]


class _Outcome(NamedTuple):
    """A fact before its answer has become a label: labels are numbered in action order."""

    action: Action
    branch: int
    intervals: int
    tokens: int
    answer: str | None
    finished: bool


def _phases(actions: Sequence[Action], width: int) -> list[list[tuple[int, Action, int]]]:
    """Split a round so that each phase has one action of a branch at most: (position, action, branch) each."""
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


def _wire(call: Call, steps: Sequence[_Step]) -> Call:
    call.outputs = [step.output for step in steps]
    return call


def _derive(seed: int, branch: int, piece: int) -> int:
    """A seed of its own for each request of each branch: one used twice would draw the same numbers again."""
    digest = blake2b(f"{seed}/{branch}/{piece}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF


def _first(stops: Sequence[str], text: str, known: int) -> int | None:
    """Where the first of `stops` begins in `text`, looking at what could involve anything beyond `known`."""
    found = [text.find(stop, max(0, known - len(stop) + 1)) for stop in stops]
    return min((at for at in found if at >= 0), default=None)
