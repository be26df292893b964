"""The environment of a live request: its branches, run on vLLM.

A round goes out in as few requests as can be: all branches that run equally long share one, all probes share another.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from controllers import TO_END, Action, Advanced, Fact, Probed, Verb
from discovery.answers import VOTABLE_TYPES, Answer, Labels
from proxy import probe_templates
from proxy.environment import votability
from proxy.environment.answer_reader import Grader, PlainGrader
from proxy.environment.stop_strings import StopStrings
from proxy.errors import UpstreamError
from proxy.types import STREAM_INTERVAL, Call, EnvironmentLimits, LiveBranch, Output, Prompt
from proxy.upstream.client import UpstreamClient
from proxy.upstream.detokeniser import CallDecoder, Detokeniser

OPEN_STREAM_INTERVAL: Final = 8
"""Tokens that come together while it is open whether the task can be voted on, at most."""
PIECES: Final = 4
"""Pieces in which the tokens of a short call come, at least."""
UNASKED: Final = 2
"""Branches that may be opened before it is known that the task can be voted on."""


class SentBytesExceeded(Exception):
    """The request has sent the upstream as many bytes as it may."""


class BranchesTruncated(Exception):
    """The branches were cut at the client's limit before they answered, and more of them would be too."""


class NotVotable(Exception):
    """The first branch to finish gives nothing that can be voted on."""


@dataclass(slots=True)
class TokenMeter:
    """What the upstream did for one request, by its own usage."""

    requests: int = 0
    prompt_tokens: int = 0  # context re-sent with every request included
    cached_tokens: int | None = None  # of these, known to come from the prefix cache; None if the server does not say
    first: Call | None = None  # that it made
    generated_tokens: int = 0
    suffix_tokens: int = 0  # prompt tokens of our own making: what probes append
    aborted_tokens: int = 0  # generated in requests that were cut, as far as seen
    most_unseen: int = 0  # generated in those and not seen, at most; they are not billed
    sent_bytes: int = 0  # of the bodies of its requests, about

    @property
    def first_cached(self) -> int | None:
        """Tokens of the prompt that were cached when the request came."""
        return None if self.first is None else self.first.cached_tokens

    @property
    def billed(self) -> int:
        """All the request made the upstream do beyond reading the prompt."""
        return self.completed + self.aborted_tokens

    @property
    def completed(self) -> int:
        """The same without what was cut."""
        return self.generated_tokens + self.suffix_tokens

    def add(self, call: Call) -> None:
        """Take in a call that ended well."""
        self.requests += 1
        self.prompt_tokens += call.prompt_tokens
        self.generated_tokens += call.generated
        self.suffix_tokens += call.suffix_tokens
        if call.cached_tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + call.cached_tokens


class _Step(NamedTuple):
    """One action on its way: where its output lands."""

    action: Action
    branch: int
    output: Output
    most: int  # tokens it may generate
    before: int = 0  # tokens it was given that had been run ahead


class LiveEnvironment:
    """Implements `controllers.Environment` over an UpstreamClient. One object serves one request.

    `execute` raises UpstreamError. When it fails or is cancelled, `salvage` keeps what had already been generated.
    """

    def __init__(
        self, engine: UpstreamClient, prompt: Prompt, limits: EnvironmentLimits, grader: Grader | None = None
    ) -> None:
        self.engine = engine
        self.prompt = prompt
        self.limits = limits
        self.branches: list[LiveBranch] = []
        self.labels = Labels()
        self.grader = grader or PlainGrader()
        self.meter = TokenMeter()
        self.votable = prompt.kind.is_declared_votable  # as far as is known
        self.votable_confirmed = self.votable  # the client says so, or a branch has finished with an answer
        self.vouched = False  # a probe has answered
        self.unreadable = 0  # branches that have finished with a reply in which there is no answer
        self.refused: str | None = None  # why the controller's decision did not end it: see `About.refused`
        self.ends_early = True  # unless whatever its branches say is wanted
        self.scouted = 0  # tokens of probes that no controller asked for
        self.cut_probes = 0  # replies that were cut by a stop string and asked for their answer
        self.priority = 0  # of its requests
        self.stops = StopStrings(prompt.stop, prompt.template, prompt.tail)
        self._decoder = CallDecoder(prompt.ids)
        self._scout: LiveBranch | None = None  # a branch run ahead that has not been opened yet
        self._flying: list[tuple[LiveBranch | None, Output]] = []  # what is being generated, and for which branch

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        most = self.limits.sent_bytes
        if most is not None and not self.priority and self.meter.sent_bytes > most:
            raise SentBytesExceeded
        facts: dict[int, _Outcome] = {}
        with self.engine.observer.round(actions):
            await self._admit(actions)
            for phase in _phases(actions, len(self.branches)):
                await self._run(phase, facts)
        return [await self._fact(facts[i]) for i in sorted(facts)]

    def salvage(self) -> None:
        """Append to the branches what nobody was told of: what was run ahead, and what cut requests had generated."""
        if self._scout is not None:
            self.branches.append(self._scout)
            self._scout = None
        for branch in self.branches:
            while branch.ahead:
                self._grow(branch, branch.ahead.popleft())
        for owner, output in self._flying:
            if owner is not None and output.raw is None:  # its text was still to be decoded
                self._grow(owner, output)
        self._flying.clear()

    def write_off(self) -> None:
        """What a cut request had generated becomes no branch's."""
        self._flying.clear()

    async def number(self, answer: Answer | None) -> int | None:
        """The label of an answer; where forms do not settle which, the grader is asked."""
        if answer is None:
            return None
        doubtful = self.labels.undecided(answer.form)
        equal = await self.grader.compare(answer.written, doubtful) if doubtful else None
        return self.labels.assign(answer.form, answer.written, equal)

    async def read(self, text: str) -> Answer | None:
        """What the reply in a branch's text answers."""
        return await self.grader.read(self.prompt.template.split(self.prompt.tail, text)[1], self.prompt.kind)

    async def _answer(self, branch: LiveBranch) -> Answer | None:
        """Return the answer of a finished branch, read once. A branch cut in its thought has none.

        A reply that a stop string of the client's cut before its answer is asked for it, as if by a probe.
        """
        if not branch.is_read and branch.finish == "stop":
            branch.answer, branch.is_read = await self.read(branch.text), True
            if branch.answer is None and branch.is_cut and self.prompt.kind.is_probeable and self._may_ask():
                branch.answer = await self._ask(branch.ids, branch.text)
        return branch.answer

    def _may_ask(self) -> bool:
        """Whether another reply that was cut may be asked for its answer."""
        self.cut_probes += 1
        return self.limits.cut_probes is None or self.cut_probes <= self.limits.cut_probes

    async def suffix(self, index: int, *, lead: bool) -> list[int]:
        """Ids that close branch `index`'s thought and, with `lead`, lead into its answer."""
        return await self._suffix(self.branches[index].text, lead=lead)

    async def _suffix(self, text: str, *, lead: bool) -> list[int]:
        make = self.prompt.template.suffix if lead else self.prompt.template.closing
        return await self.engine.tokenise_suffix(self.prompt.model, make(self.prompt.tail, text))

    async def extend(self, index: int, suffix: Sequence[int], most: int, sampling: Mapping[str, Any]) -> Output:
        """What follows branch `index` and `suffix`, outside the branch's own text."""
        return await self._alone([*self._context(index), *suffix], most, sampling, suffix=len(suffix))

    async def ask_at(self, points: Sequence[tuple[int, int]]) -> list[Probed]:
        """What branches would have answered after so many whole intervals: (branch, intervals) each."""
        contexts: list[list[int]] = []
        suffixes: list[list[int]] = []
        for index, intervals in points:
            ids = self.branches[index].ids[: intervals * self.limits.interval]
            suffixes.append(await self._suffix(await self._detokeniser.visible(ids), lead=True))
            contexts.append([*self.prompt.ids, *ids, *suffixes[-1]])
        call = Call(contexts, self.limits.probe, probe_templates.sampling(), suffix_tokens=sum(map(len, suffixes)))
        await self._generate(call)
        asked = zip(points, suffixes, call.outputs, strict=True)
        return [
            Probed(index, await self.number(await self._said(output)), len(suffix) + len(output.ids))
            for (index, _), suffix, output in asked
        ]

    async def _said(self, output: Output) -> Answer | None:
        """What a probe's continuation answers."""
        text = self.prompt.template.answered(output.text)
        return None if text is None else await self.grader.read(text, self.prompt.kind)

    async def _alone(
        self,
        context: Sequence[int],
        most: int,
        sampling: Mapping[str, Any],
        owner: LiveBranch | None = None,
        *,
        suffix: int = 0,
    ) -> Output:
        """What follows `context`, the last `suffix` tokens of which are ours, in a request of its own; if that is cut,
        `owner` keeps what there was."""
        call = Call([context], most, sampling, suffix_tokens=suffix)
        self._flying = [(owner, call.outputs[0])]
        await self._generate(call)
        self._flying = []
        return call.outputs[0]

    async def _generate(self, call: Call) -> None:
        """Run `call`, and bill it, however it ends. The text of its outputs is that of their ids."""
        meter = self.meter
        meter.first = meter.first or call
        meter.sent_bytes += call.size
        call.priority, call.salt = self.priority, self.prompt.salt
        call.stream_interval = self._stream_interval(call.max_tokens)
        try:
            if (
                call.suffix_tokens and self.prompt.template in probe_templates.TEMPLATES.values()
            ):  # these end in plain text
                await self.engine.generate(self.prompt.model, call)
            else:
                async with self._decoder.over(call, self._detokeniser):
                    await self.engine.generate(self.prompt.model, call)
        except BaseException as error:
            meter.aborted_tokens += call.generated
            if call.generated or not isinstance(error, UpstreamError):  # else it was not even begun
                meter.most_unseen += call.most_unseen
            raise
        meter.add(call)

    def _stream_interval(self, most: int) -> int:
        """Tokens that are to come together, in a call for up to `most` a branch.

        What has not come when a call is cut is not billed. Calls are often cut while it is open whether the task can be
        voted on, and short ones would be cut before anything but their first token has come.
        """
        if not self.votable_confirmed:
            return max(1, min(OPEN_STREAM_INTERVAL, most // PIECES))
        return STREAM_INTERVAL if most >= STREAM_INTERVAL else max(1, most // PIECES)

    @property
    def _detokeniser(self) -> Detokeniser:
        return Detokeniser(self.engine, self.prompt.model)

    # Whether the task can be voted on

    async def _admit(self, actions: Sequence[Action]) -> None:
        """Before a third branch is opened, find out with one whether there is anything to vote on.

        Its first interval is run ahead, and it is probed. An answer that is no mere word vouches for the task, if the
        question or the branch's own text shows another sign of one. Otherwise the branch is run to its end, alone.
        Raises NotVotable if that gives no answer. What was run ahead is what the branch gets when the controller asks.
        """
        opening = sum(action.verb is Verb.BRANCH for action in actions)
        if opening and self.ends_early:
            await self._check_limit()
        if self.votable or not opening or len(self.branches) + opening <= UNASKED:
            return
        running = [branch for branch in self.branches if branch.finish is None]
        if self.branches and not running:
            return  # cut by their length: nothing is known, and nothing will be
        if running:
            scout = max(running, key=lambda branch: len(branch.ids))
        elif self._scout is not None:
            scout = self._scout
        else:
            scout = self._scout = LiveBranch()
            await self._run_ahead(scout)
        if not self.votable and not self._ended(scout) and self.prompt.kind.is_probeable:
            self.votable = self.vouched = await self._vouches(scout)
        while not self.votable and not self._ended(scout):
            await self._run_ahead(scout)
        if not self.votable and self.ends_early and self._is_cut_short(scout):
            raise BranchesTruncated
        self.votable = True

    async def _check_limit(self) -> None:
        """Open no more branches than show that the client's limit cuts them. Raises BranchesTruncated once it has.

        Where the limit is no longer than an interval, the first branch is run ahead alone.
        """
        if not self.branches and self._scout is None and self.limits.branch <= self.limits.interval:
            self._scout = LiveBranch()
            await self._run_ahead(self._scout)
            if self._is_cut_short(self._scout):
                raise BranchesTruncated
        if self.branches and all(branch.finish == "length" for branch in self.branches) and not self.vouched:
            raise BranchesTruncated

    def _is_cut_short(self, branch: LiveBranch) -> bool:
        """Whether `branch` has all the tokens it may have, and has not come to an end."""
        last = branch.ahead[-1].finish if branch.ahead else branch.finish
        return last != "stop" and len(_all_of(branch)[0]) >= self.limits.branch

    async def _run_ahead(self, branch: LiveBranch) -> None:
        """One more interval of `branch`, kept until it is asked for. Raises NotVotable if it ends without an answer."""
        ids, known = _all_of(branch)
        most = min(self.limits.interval, self.limits.branch - len(ids))
        piece = branch.pieces + len(branch.ahead)
        sampling = self._sampling(known, self._index(branch), piece)
        output = await self._alone([*self.prompt.ids, *ids], most, sampling, branch)
        branch.ahead.append(output)
        ids, text = _all_of(branch)
        cut = self.stops.cut(text, len(known))
        if cut is not None:
            output.finish, output.at_token = "stop", False
        if output.finish == "stop":
            is_cut = cut is not None or not output.at_token
            answer = await self._look(text[:cut], ids if is_cut else None)
            branch.answer, branch.is_read = answer, branch.is_read or is_cut

    async def _vouches(self, branch: LiveBranch) -> bool:
        """Whether `branch`, probed now, gives an answer, and it is not the only sign of one."""
        ids, text = _all_of(branch)
        return votability.vouches(self.prompt.asks, text, await self._ask(ids, text))

    async def _ask(self, ids: Sequence[int], text: str) -> Answer | None:
        """Probe a branch with these ids and this text on the proxy's own account."""
        suffix = await self._suffix(text, lead=True)
        context = [*self.prompt.ids, *ids, *suffix]
        output = await self._alone(context, self.limits.probe, probe_templates.sampling(), suffix=len(suffix))
        self.scouted += len(suffix) + len(output.ids)
        return await self._said(output)

    def _ended(self, branch: LiveBranch) -> bool:
        """Whether running `branch` ahead has come to an end."""
        ahead = sum(len(output.ids) for output in branch.ahead)
        if branch.ahead and branch.ahead[-1].finish == "stop":
            return True
        if self.limits.ahead is not None and ahead + self.limits.interval > self.limits.ahead:
            return True
        return len(branch.ids) + ahead >= self.limits.branch

    async def _look(self, text: str, cut_ids: Sequence[int] | None = None) -> Answer | None:
        """At the first branch to finish: whether there is anything to vote on. Raises NotVotable.

        With `cut_ids`, its ids, a stop string has cut it: if it does not answer, it is asked.
        """
        if self.votable_confirmed and cut_ids is None:
            return None
        answer = await self.read(text)
        if answer is None and cut_ids is not None and self.prompt.kind.is_probeable and self._may_ask():
            answer = await self._ask(cut_ids, text)
        if answer is not None:
            self.votable = self.votable_confirmed = True
        else:
            self._count_unreadable(text)
        return answer

    def _count_unreadable(self, text: str) -> None:
        """Take notice of a finished branch without an answer. Raises NotVotable.

        Where a probe has answered, a single such branch only does not vote.
        """
        if self.votable_confirmed or not self.prompt.template.split(self.prompt.tail, text)[1].strip():
            return
        self.unreadable += 1
        if self.unreadable > self.vouched:
            raise NotVotable

    def _index(self, branch: LiveBranch) -> int:
        return next((i for i, one in enumerate(self.branches) if one is branch), len(self.branches))

    # One phase: at most one action a branch, all at once

    async def _run(self, phase: Sequence[tuple[int, Action, int]], facts: dict[int, _Outcome]) -> None:
        steps: dict[int, _Step] = {}
        suffixes: dict[int, list[int]] = {}
        for position, action, index in phase:
            if action.verb is Verb.BRANCH:
                self.branches.append(self._scout or LiveBranch())
                self._scout = None
            if action.verb is Verb.PRUNE:
                continue
            branch = self.branches[index]
            if branch.finish is not None:  # finished earlier in this round
                facts[position] = _Outcome(action, index, 0, 0, None, True)
                continue
            if action.verb is Verb.PROBE:
                if not self.prompt.kind.is_probeable:
                    facts[position] = _Outcome(action, index, 0, 0, None, False)
                    continue
                suffixes[index] = await self.suffix(index, lead=True)
                steps[position] = _Step(action, index, Output(), self.limits.probe)
                continue
            before = self._reveal(branch, action.intervals)
            intervals = action.intervals if action.intervals == TO_END else action.intervals - self._intervals(before)
            most = min(intervals * self.limits.interval, self.limits.branch - len(branch.ids))
            if branch.finish is not None or most <= 0:
                facts[position] = self._advanced(action, index, before)
                continue
            steps[position] = _Step(action, index, Output(), most, before)
        while steps:
            calls = list(self._calls(steps.values(), suffixes))
            self._flying = [
                (None if step.action.verb is Verb.PROBE else self.branches[step.branch], step.output)
                for step in steps.values()
            ]
            await self._gather(calls)
            self._flying = []
            landed, steps = steps, {}
            for position, step in landed.items():
                rest = self._land(step)
                if rest is None:
                    facts[position] = self._outcome(step, suffixes)
                else:
                    steps[position] = rest
        for branch in self.branches:
            if branch.is_cut and not branch.is_read and not self.votable_confirmed:
                await self._look_at_cut(branch)

    def _reveal(self, branch: LiveBranch, intervals: int) -> int:
        """Give `branch` of what it was run ahead; returns how many tokens that was."""
        known = len(branch.ids)
        while branch.ahead and intervals > 0 and branch.finish is None:
            self._grow(branch, branch.ahead.popleft())
            intervals -= 1
        return len(branch.ids) - known

    def _intervals(self, tokens: int) -> int:
        return -(-tokens // self.limits.interval)

    def _calls(self, steps: Iterable[_Step], suffixes: Mapping[int, list[int]]) -> Iterable[Call]:
        """The requests that carry `steps`, each step's output wired to its place in one of them."""
        groups: dict[tuple[bool, bool, int, bool, bool], list[_Step]] = defaultdict(list)
        for step in steps:
            branch, most = self.branches[step.branch], step.most
            is_probe = step.action.verb is Verb.PROBE
            if not is_probe:
                most = self.stops.most(branch.text, self.limits.interval, most)
            stops = not is_probe and bool(self.stops.at_server(branch.text))
            is_greedy = not is_probe and self._is_greedy(step.branch)
            groups[is_probe, not is_probe and not branch.ids, most, stops, is_greedy].append(step)
        for (is_probe, opening, most, *_), group in groups.items():
            text = self.branches[group[0].branch].text  # all of them may be given the same stop strings
            if is_probe:
                prompts = [self._context(step.branch) + suffixes[step.branch] for step in group]
                ours = sum(len(suffixes[step.branch]) for step in group)
                yield _wire(Call(prompts, most, probe_templates.sampling(), suffix_tokens=ours), group)
            elif self.prompt.seed is not None:
                for step in group:
                    sampling = self._sampling(text, step.branch, self.branches[step.branch].pieces)
                    yield self._watch(Call([self._context(step.branch)], most, sampling), [step])
            else:
                sampling = self._sampling(text, group[0].branch)
                if opening:
                    yield self._watch(Call([self.prompt.ids], most, sampling, n=len(group)), group)
                else:
                    yield self._watch(Call([self._context(step.branch) for step in group], most, sampling), group)

    def _watch(self, call: Call, steps: Sequence[_Step]) -> Call:
        """A call of branches: the first one to finish is looked at when it does, not when its round ends."""
        _wire(call, steps)
        texts = {id(step.output): self.branches[step.branch].text for step in steps}

        async def finished(output: Output) -> None:
            if output.finish == "stop" and output.at_token:  # one that a stop string cut may have to be asked
                await self._look(texts[id(output)] + output.text)

        call.on_finish = finished
        return call

    def _context(self, index: int) -> list[int]:
        return [*self.prompt.ids, *self.branches[index].ids]

    def _is_greedy(self, index: int) -> bool:
        """Whether branch `index` is generated at temperature 0."""
        return index == 0 and self.prompt.greedy_first

    def _sampling(self, text: str, index: int, piece: int = 0) -> dict[str, Any]:
        """Return the sampling of a request that continues branch `index`, whose text is `text`.

        Where the client gave a seed, no branches share a request, and each of a branch's requests (`piece` counts
        them) gets a seed of its own: vLLM would give every prompt of a request the same one, and equal branches.
        """
        sampling = dict(self.prompt.sampling)
        if self._is_greedy(index):
            sampling["temperature"] = 0.0
        if stops := self.stops.at_server(text):
            sampling["stop"] = stops
        if self.prompt.template.special:
            sampling["skip_special_tokens"] = False
        if self.prompt.seed is not None:
            sampling["seed"] = _derive(self.prompt.seed, index, piece)
        return sampling

    async def _gather(self, calls: Sequence[Call]) -> None:
        """Run `calls` at once; the first to fail cancels the others and its error is raised."""
        tasks = [asyncio.create_task(self._generate(call)) for call in calls]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # What came of it

    def _land(self, step: _Step) -> _Step | None:
        """Give a branch what a request brought; returns the step that is left to do, if it is not done."""
        if step.action.verb is Verb.PROBE:
            return None
        branch, tokens = self.branches[step.branch], len(step.output.ids)
        self._grow(branch, step.output)
        if branch.finish is not None or tokens >= step.most:
            return None
        return _Step(step.action, step.branch, Output(), step.most - tokens, step.before + tokens)

    def _outcome(self, step: _Step, suffixes: Mapping[int, list[int]]) -> _Outcome:
        """Return the outcome of a step that is done."""
        tokens = len(step.output.ids)
        if step.action.verb is Verb.PROBE:
            return _Outcome(step.action, step.branch, 0, tokens + len(suffixes[step.branch]), step.output, False)
        return self._advanced(step.action, step.branch, step.before + tokens)

    async def _look_at_cut(self, branch: LiveBranch) -> None:
        """Check votability at a branch that a stop string finished. Raises NotVotable."""
        if await self._answer(branch) is not None:
            self.votable = self.votable_confirmed = True
        else:
            self._count_unreadable(branch.text)

    def _advanced(self, action: Action, index: int, tokens: int) -> _Outcome:
        branch = self.branches[index]
        return _Outcome(action, index, max(1, self._intervals(tokens)), tokens, None, branch.finish is not None)

    def _grow(self, branch: LiveBranch, output: Output) -> None:
        known = len(branch.text)
        branch.ids += output.ids
        branch.text += output.text
        branch.pieces += 1
        if output.finish == "stop":
            branch.finish, branch.is_cut = "stop", not output.at_token
        cut = self.stops.cut(branch.text, known)
        if cut is not None:
            branch.text, branch.finish, branch.is_cut = branch.text[:cut], "stop", True
        if branch.finish != "stop" and len(branch.ids) >= self.limits.branch:
            branch.finish = "length"  # cut mid-thought: it answers nothing

    async def _fact(self, outcome: _Outcome) -> Fact:
        branch = self.branches[outcome.branch]
        if outcome.finished:
            label = branch.label = await self.number(await self._answer(branch))
        else:
            answer = None if outcome.probe is None else await self._said(outcome.probe)
            self.vouched = self.vouched or (answer is not None and answer.form.type in VOTABLE_TYPES)
            label = await self.number(answer)
        if outcome.action.verb is Verb.PROBE:
            return Probed(outcome.branch, label, outcome.tokens)
        return Advanced(outcome.branch, outcome.intervals, outcome.tokens, outcome.finished, label)


class _Outcome(NamedTuple):
    """A fact before its answer is read and has become a label: labels are numbered in action order."""

    action: Action
    branch: int
    intervals: int
    tokens: int
    probe: Output | None  # what a probe wrote
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


def _all_of(branch: LiveBranch) -> tuple[list[int], str]:
    """Ids and text of `branch`, what was run ahead included."""
    ids = [*branch.ids, *(i for output in branch.ahead for i in output.ids)]
    return ids, branch.text + "".join(output.text for output in branch.ahead)


def _derive(seed: int, branch: int, piece: int) -> int:
    """A seed of its own for each request of each branch: one used twice would draw the same numbers again."""
    digest = blake2b(f"{seed}/{branch}/{piece}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF
