"""Environment of a live request whose branches are whole replies: each is one streamed chat completion of the upstream.

The upstream itself applies tools, their parsers, response formats, images, penalties and log-probabilities. It cannot
pause a reply, so each stream is read as it comes, and an interval is a count of its tokens. What arrives before the
controller advances a branch is kept, but not revealed. Every token that arrives is billed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from controllers import Action, Advanced, Fact, IllegalAction, Verb
from controllers.limits import branch_limit, free_tokens
from discovery.answers.code import Behaviour
from proxy.environment.answer_reader import Grader, PlainGrader
from proxy.environment.call_continuation import derive_seed
from proxy.environment.live_environment import SentBytesExceeded
from proxy.environment.reply_votes import ReplyVotes, SelectedReply, VoteTexts
from proxy.environment.selection.code_runner import FunctionRunner, SealedRunner
from proxy.environment.selection.judge_prompt import ReplyCandidate
from proxy.environment.selection.reply_judge import SPARE_TOKENS
from proxy.environment.token_meter import TokenMeter
from proxy.environment.votability_check import BranchesTruncated, NotVotable
from proxy.reply_request import ReplyRequest
from proxy.types import Call, EnvironmentLimits, Model, Prompt
from proxy.upstream.chat_stream import ChatOutput
from proxy.upstream.completion_stream import compact_json
from proxy.upstream.fleet.interface import Upstream

STREAM_INTERVAL: Final = 1
"""Tokens per chunk. Tool parsers read single tokens most reliably, and when a reply is cut few tokens are unknown."""


@dataclass(slots=True)
class ReplyBranch:
    """A streamed reply, and how much of it the controller knows."""

    call: Call
    output: ChatOutput
    stream: asyncio.Task[None]  # ends when the reply is complete and checked
    revealed: int = 0  # tokens that facts have revealed
    finish: str | None = None  # "stop", "length", or None until a fact has revealed its end
    label: int | None = None
    is_read: bool = False

    @property
    def ids(self) -> Sequence[int]:
        """Ids of all tokens that have arrived."""
        return self.output.ids

    async def reach(self, tokens: int) -> None:
        """Wait until `tokens` tokens have arrived or the reply is complete. Raises UpstreamError."""
        output = self.output
        while not self.stream.done():
            arrived = len(output.ids)
            if arrived > tokens or (arrived == tokens and output.finish is None):
                return
            output.grown.clear()
            await output.grown.wait()
        self.stream.result()

    @property
    def is_complete(self) -> bool:
        """Whether the reply has ended by itself, and its end is revealed."""
        stream = self.stream
        return self.finish is not None and stream.done() and not stream.cancelled() and not self._has_failed

    @property
    def _has_failed(self) -> bool:
        """Whether the upstream's error ended the reply, even after it seemed complete."""
        stream = self.stream
        return stream.done() and not stream.cancelled() and stream.exception() is not None

    def reveal(self, tokens: int) -> int:
        """Reveal up to `tokens` tokens in all. Returns how many are new."""
        before, arrived = self.revealed, len(self.output.ids)
        self.revealed = max(before, min(tokens, arrived))
        if self.output.finish is not None and self.revealed == arrived and not self._has_failed:
            self.finish = self.output.finish
        return self.revealed - before


class ReplyEnvironment:
    """Implements `controllers.Environment` over an Upstream. One object serves one request.

    There are no probes, no pauses and no signals. `execute` raises UpstreamError, NotVotable, BranchesTruncated
    or SentBytesExceeded. `close` must be called when the episode has ended: it aborts the replies that still run, and
    bills their tokens.
    """

    own_probe_tokens = 0

    def __init__(
        self,
        engine: Upstream,
        model: Model,
        prompt: Prompt,
        request: ReplyRequest,
        limits: EnvironmentLimits,
        grader: Grader | None = None,
        runner: FunctionRunner | None = None,
        keeps_all_branches: bool = False,
    ) -> None:
        """`prompt` gives sampling, seed, salt and the kind of vote; it has no token ids.

        With `keeps_all_branches`, for recordings, it is not checked whether the task can be voted on.
        """
        self.engine = engine
        self.prompt = prompt
        self.request = request
        self.limits = limits
        self.branches: list[ReplyBranch] = []
        self.meter = TokenMeter()
        self.cutoff: str | None = None
        self.votable = True
        self._model = model
        self._votes = ReplyVotes(request, prompt.kind, grader or PlainGrader(), runner or SealedRunner())
        self._keeps_all_branches = keeps_all_branches
        self._priority = prompt.priority
        self._width = 0  # branches that the controller has opened
        self._messages = compact_json(request.body["messages"])  # once for all branches
        self._fields = {name: value for name, value in request.body.items() if name != "messages"}
        self._size = len(compact_json(self._fields)) + len(self._messages)  # of each branch's request in bytes

    @property
    def labels(self) -> VoteTexts:
        """The votes behind the labels."""
        return self._votes.labels

    @property
    def unreadable(self) -> int:
        """Complete replies that have no vote because their arguments or their JSON cannot be read."""
        return self._votes.unreadable

    @property
    def behaviours(self) -> Mapping[int, Behaviour]:
        """Outcomes of the functions in replies, by branch, as far as they could be run."""
        return self._votes.behaviours

    def run_no_more(self) -> None:
        """Run no functions of further replies, because the deadline has passed."""
        self._votes.may_run = False

    def record_cutoff(self, reason: str) -> None:
        """Record why the proxy, not the controller, ended the episode. The store has it as `refused`."""
        self.cutoff = reason

    @property
    def judge_room(self) -> int | None:
        """Tokens that the judge may cost under the token cap; None without a cap."""
        judge = self.request.judge
        return None if judge is None or judge.cap is None else judge.cap - self.meter.billed

    @property
    def judge_context(self) -> int | None:
        """Tokens of the model's context beside the conversation; None if unknown."""
        prompt = max((branch.call.prompt_tokens for branch in self.branches), default=0)
        return self._model.max_length - prompt - SPARE_TOKENS if self._model.max_length else None

    @property
    def candidates(self) -> Sequence[ReplyCandidate]:
        """The complete replies with a text and without tool calls, which can be compared."""
        complete = ((index, each.output) for index, each in enumerate(self.branches) if each.finish == "stop")
        return [ReplyCandidate(index, o.content) for index, o in complete if o.content.strip() and not o.tool_calls]

    async def select(self, branches: Sequence[int]) -> SelectedReply | None:
        """Return the reply that a vote on tool calls or JSON selects; None if there is no such vote."""
        return await self._votes.select(branches)

    async def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text. Raises UpstreamError."""
        return len(await self.engine.tokenise_plain(self._model.id, text))

    async def ask_judge(self, body: Mapping[str, Any], max_tokens: int, own_tokens: int) -> ChatOutput:
        """Send a chat completion about the replies. Its output and `own_tokens` of its prompt are billed as `judge`.

        A call that is cut is billed as aborted instead. Raises UpstreamError.
        """
        call, output = self._call(max_tokens), ChatOutput()
        call.outputs, call.suffix_tokens = [output], own_tokens
        sent = self._limited(body, max_tokens)
        messages = compact_json(sent.pop("messages"))
        self.meter.sent_bytes += len(compact_json(sent)) + len(messages)
        if self.prompt.seed is not None:
            sent["seed"] = derive_seed(self.prompt.seed, len(self.branches), 0)
        await self._generate(call, sent, messages)
        self.meter.judge_tokens += call.generated + own_tokens
        return output

    def continue_in_background(self, engine: Upstream, priority: int) -> None:
        """Prepare to open more branches after the answer has gone out, on `engine` and with this priority.

        The token cap and the byte limit do not apply then.
        """
        self.engine, self._priority, self._keeps_all_branches = engine, priority, True
        self.limits = self.limits._replace(branch=self.request.branch_tokens, cap=None, sent_bytes=None)

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        if self.limits.sent_bytes is not None and self.meter.sent_bytes > self.limits.sent_bytes:
            raise SentBytesExceeded
        with self.engine.observer.round(actions):
            opening = sum(action.verb is Verb.BRANCH for action in actions)
            if opening:
                limit = self._limit(opening)
                self._check_truncated()
                await self._check_votable(opening, limit)
                while len(self.branches) < self._width + opening:
                    self._open(limit)
            running = {action.branch for action in actions if action.verb is Verb.CONTINUE}
            running |= set(range(self._width, self._width + opening))
            for action in actions:
                if action.verb is Verb.PRUNE and action.branch not in running:
                    self._abort(action.branch)
            facts: list[Fact] = []
            for action in actions:
                if action.verb is Verb.BRANCH:
                    self._width += 1
                    facts.append(await self._advance(self._width - 1, action.intervals))
                elif action.verb is Verb.CONTINUE:
                    facts.append(await self._advance(action.branch, action.intervals))
                elif action.verb is Verb.PRUNE:
                    self._abort(action.branch)
                elif action.verb is Verb.PROBE:
                    raise IllegalAction("PROBE: a reply of the upstream cannot be probed")
        return facts

    async def close(self) -> None:
        """Abort the replies that still run, and wait until their tokens are billed."""
        for index in range(len(self.branches)):
            self._abort(index)
        await asyncio.gather(*(branch.stream for branch in self.branches), return_exceptions=True)

    def salvage(self) -> None:
        """Reveal all that has arrived. Labels of replies that had not been revealed stay unknown."""
        for branch in self.branches:
            branch.reveal(len(branch.ids))

    async def read_finished(self, index: int) -> int | None:
        """Return the label of a complete reply, also if no fact has revealed it."""
        branch = self.branches[index]
        if branch.finish is not None and not branch.is_read:
            branch.label, branch.is_read = await self._votes.read(index, branch.output), True
        return branch.label

    def _limit(self, opening: int) -> int:
        """Return the most tokens of each branch of a round that opens as many, as the state reserves them."""
        if self.limits.cap is None:
            return self.limits.branch
        known = ((branch.call.max_tokens, branch.revealed, branch.finish is not None) for branch in self.branches)
        return branch_limit(self.limits.branch, free_tokens(self.limits.cap, known), opening)

    def _open(self, limit: int) -> None:
        index = len(self.branches)
        output = ChatOutput()
        call = self._call(limit)
        call.outputs = [output]
        self.meter.sent_bytes += self._size
        stream = asyncio.create_task(self._generate(call, self._branch_fields(index, limit), self._messages))
        stream.add_done_callback(lambda _: output.grown.set())
        self.branches.append(ReplyBranch(call, output, stream))

    def _call(self, limit: int) -> Call:
        interval = STREAM_INTERVAL
        return Call([()], limit, {}, salt=self.prompt.salt, stream_interval=interval, priority=self._priority)

    async def _generate(self, call: Call, fields: Mapping[str, Any], messages: bytes) -> None:
        with self.meter.billing(call):
            await self.engine.chat(self._model, call, fields, messages)

    def _branch_fields(self, index: int, limit: int) -> dict[str, Any]:
        """Return a branch's request without the messages. At temperature 0 only the first branch is greedy."""
        fields, prompt = dict(self._fields), self.prompt
        if self.limits.cap is not None:  # otherwise the upstream's own limit is the room that the prompt leaves
            fields = self._limited(fields, limit)
        if prompt.greedy_first and index > 0:
            fields.pop("temperature", None)
            fields.update({name: value for name, value in prompt.sampling.items() if name == "temperature"})
        if prompt.seed is not None:
            fields["seed"] = derive_seed(prompt.seed, index, 0)
        return fields

    def _limited(self, body: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """Return a body with another limit of its tokens."""
        return {**body, "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens": limit}

    def _abort(self, index: int) -> None:
        """Close the connection of a branch, unless its reply is complete. The upstream then stops generating."""
        self.branches[index].stream.cancel()

    def _check_truncated(self) -> None:
        """Raise BranchesTruncated if nothing has voted and the token limit cut each reply that ended so far."""
        ends = {branch.finish for branch in self.branches if branch.finish is not None}
        if ends == {"length"} and not self._keeps_all_branches and not len(self.labels):
            raise BranchesTruncated

    async def _check_votable(self, opening: int, limit: int) -> None:
        """Before texts are compared, run the first branch to its end alone, and see whether it has an answer.

        Raises NotVotable or BranchesTruncated if it has none. If the question asks for an answer, it is looked for only
        once that branch has finished.
        """
        if (
            self._keeps_all_branches
            or self._votes.is_certain
            or self.prompt.kind.is_declared_votable
            or len(self.labels)
        ):
            return
        if not self.branches and not self.prompt.asks_for_answer and opening > 1:
            self._open(limit)
        if not self.branches:
            return
        first = self.branches[0]
        if not self.prompt.asks_for_answer and not first.stream.cancelling():  # unless the controller pruned it
            await first.reach(first.call.max_tokens)
        if not first.stream.done() or first.output.finish is None or await self._votes.has_answer(first.output):
            return
        if first.output.finish == "length":
            raise BranchesTruncated
        self.votable = False
        raise NotVotable

    async def _advance(self, index: int, intervals: int) -> Advanced:
        branch, interval = self.branches[index], self.limits.interval
        if branch.finish is not None:
            return Advanced(index, 0, 0, True, branch.label)
        target = branch.revealed + min(intervals * interval, branch.call.max_tokens)
        await branch.reach(target)
        tokens = branch.reveal(target)
        label = await self.read_finished(index)
        return Advanced(index, max(1, -(-tokens // interval)), tokens, branch.finish is not None, label)
