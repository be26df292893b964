"""Number the replies of one request by what they say: tool calls, JSON or an answer in text. Then select one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from enum import StrEnum
from hashlib import blake2b
from itertools import islice
from typing import Final, NamedTuple, TypeVar

from discovery.answers import AUTO, AnswerKind, ExtractionMethod, Labels, medoid
from discovery.answers.code import Behaviour, CodeTask, code_blocks
from discovery.answers.structured import (
    NO_CALL,
    CallSet,
    FieldBallot,
    InvalidJson,
    ToolBallot,
    ToolSchemas,
    calls_class,
    canonical_text,
    document_class,
    fields_of,
    no_call_class,
    parse_json,
    select_by_calls,
    vote_on_fields,
    with_defaults,
)
from proxy.environment.answer_reader import Grader
from proxy.environment.branch_answers import number_answer
from proxy.environment.selection.code_runner import FunctionRunner
from proxy.environment.selection.reply_judge import ReplyJudgement
from proxy.reply_request import ReplyRequest
from proxy.upstream.chat_stream import ChatOutput

T = TypeVar("T")

MAX_WRITTEN: Final = 200
"""Maximum number of characters with which a vote is shown. Longer ones end in a hash that tells them apart."""
MAX_READ_AT_ONCE: Final = 10_000
"""Maximum number of characters of a reply that is read on the event loop."""
CHARS_PER_CALL: Final = 100
"""Characters that take as long to read as the defaults of one call take to fill in."""
CHARS_PER_FIELD: Final = 10
"""Characters that take as long to read as one field takes to vote on."""
MAX_SHOWN_FIELDS: Final = 256
"""Maximum number of fields whose agreement is reported."""

_TEXT: Final = AnswerKind(ExtractionMethod.TEXT, "words")


class VoteTexts:
    """Texts of the votes, numbered from 0 in the order of their first appearance."""

    def __init__(self) -> None:
        self.classes: dict[int, str] = {}  # of structured votes, by label: what recordings hold in place of their texts
        self._numbers: dict[Hashable, int] = {}
        self._texts: list[str] = []
        self._recorded: dict[int, str] = {}  # by label, unless it is the text

    def __len__(self) -> int:
        return len(self._texts)

    def written(self, label: int) -> str:
        """Return the text of the first vote with this label."""
        return self._texts[label]

    def recorded(self, label: int) -> str:
        """Return what a recording holds of a vote: the class of a structured vote, else a text that replay reads."""
        return self.classes.get(label) or self._recorded.get(label) or self._texts[label]

    def number(self, key: Hashable, text: str, vote_class: str | None = None, recorded: str = "") -> int:
        """Return the label of a vote. Votes with equal keys have equal labels. Structured votes have a class.

        `recorded` is what a recording holds in place of the text.
        """
        label = self._numbers.setdefault(key, len(self._texts))
        if label == len(self._texts):
            self._texts.append(_shortened(text))
            if vote_class is not None:
                self.classes[label] = vote_class
            if recorded:
                self._recorded[label] = _shortened(recorded)
        return label


class SelectedBy(StrEnum):
    """Method that decided which reply the client gets."""

    VOTE = "vote"  # the vote on tool calls, fields or answers
    JUDGE = "judge"  # the model, which compared the replies
    OVERLAP = "overlap"  # the words that the replies share


class SelectedReply(NamedTuple):
    """The reply that the client gets."""

    branch: int
    fields: Mapping[str, float] | None = None  # agreement on each field; None unless JSON documents were voted on
    by: SelectedBy | None = None  # None: there was nothing to choose from
    judgement: ReplyJudgement | None = None  # None unless replies are judged; it may have written a new reply


class ReplyVotes:
    """The votes of one request's replies. The kind of vote follows from the request."""

    def __init__(self, request: ReplyRequest, kind: AnswerKind, grader: Grader, runner: FunctionRunner) -> None:
        """`kind` is that of the plan: tools, json, or the kind of answer that a text is read for."""
        self.labels = VoteTexts()
        self.unreadable = 0  # complete replies whose arguments or JSON cannot be read; they do not vote
        self._request = request
        self._is_judged = kind.is_judged
        self._votes_on_tools = kind.method is ExtractionMethod.TOOLS or (kind.is_judged and bool(request.tools))
        self._votes_on_json = kind.method is ExtractionMethod.JSON or (request.expects_json and not kind.is_judged)
        self._kind = AUTO if kind.method in (ExtractionMethod.TOOLS, ExtractionMethod.JSON) else kind
        self._schemas = ToolSchemas(request.tools, request.exclude)
        self._grader = grader
        self._runner = runner
        self.behaviours: dict[int, Behaviour] = {}  # of functions in replies, by branch
        self.may_run = True  # functions in replies
        self._answers = Labels()  # numbers answers in texts
        self._tool_ballots: dict[int, ToolBallot] = {}  # by branch
        self._field_ballots: dict[int, FieldBallot] = {}
        self._texts: dict[int, str] = {}  # of replies that call no tool, in votes on tools

    @property
    def is_certain(self) -> bool:
        """Whether each complete reply has a vote, unless it cannot be read, or can be judged."""
        return self._votes_on_tools or self._votes_on_json or self._is_judged

    async def read(self, branch: int, output: ChatOutput) -> int | None:
        """Return the label of a finished branch; None if it has no vote. A reply that was cut has none."""
        if output.finish != "stop":
            return None
        if self._votes_on_tools and output.calls:
            return await self._read_calls(branch, output.calls)
        if self._votes_on_json:
            label = await self._read_document(branch, output.content)
            if self._votes_on_tools and label is not None:
                self._tool_ballots[branch] = ToolBallot(label)
            return label
        if self._request.code is not None:
            return await self._read_code(branch, output.content, self._request.code)
        if self._is_judged and not self._votes_on_tools:
            return await self._number_text(branch, output.content)
        answer = None if self._is_judged else await self._grader.read(output.content, self._kind)
        number = await number_answer(self._grader, self._answers, answer)
        label = None
        if answer is not None and number is not None:
            spelled = self._answers.recorded(number)
            label = self.labels.number(("answer", number), answer.written, recorded=spelled)
        if self._votes_on_tools:
            self._tool_ballots[branch] = ToolBallot(label)
            self._texts[branch] = output.content
            return self.labels.number(NO_CALL, NO_CALL, no_call_class()) if label is None else label
        return label

    async def _read_code(self, branch: int, text: str, task: CodeTask) -> int | None:
        """Return the label of a reply by what its function returns; None if it cannot be run."""
        if not self.may_run:
            return None
        inputs = [example.arguments for example in task.examples]
        blocks = await _run(len(text), lambda: code_blocks(text))
        outcomes = await self._runner.run(blocks, task.function, inputs)
        behaviour = None if outcomes is None else Behaviour.of(outcomes, task, text)
        if behaviour is None:
            return None
        self.behaviours[branch] = behaviour
        return self.labels.number(("code", behaviour.outcomes), behaviour.written)

    async def _number_text(self, branch: int, text: str) -> int | None:
        """Return the label of a reply that is compared by the model. Replies of the same words have the same label."""
        spelled = await _run(len(text), lambda: _TEXT.comparator(text))
        return None if spelled is None else self.labels.number(("text", spelled), f"reply {branch + 1}")

    async def has_answer(self, output: ChatOutput) -> bool:
        """Return whether an answer that can be compared can be read in a reply of text."""
        return await self._grader.read(output.content, self._kind) is not None

    async def _read_calls(self, branch: int, calls: Sequence[tuple[str, str]]) -> int | None:
        size = sum(len(arguments) + CHARS_PER_CALL for _, arguments in calls)
        call_set: CallSet | None = await _run(size, lambda: self._schemas.read(calls))
        if call_set is None:
            self.unreadable += 1
            return None
        text = ", ".join(f"{name}({arguments})" for name, arguments in calls)
        label = self.labels.number(call_set.calls, text, calls_class(call_set))
        self._tool_ballots[branch] = ToolBallot(label, call_set)
        return label

    async def _read_document(self, branch: int, content: str) -> int | None:
        def read() -> tuple[str, Mapping[str, str]]:
            value = with_defaults(parse_json(content), self._request.schema)
            return canonical_text(value), fields_of(value)

        try:
            text, fields = await _run(len(content), read)
        except InvalidJson:
            self.unreadable += 1
            return None
        label = self.labels.number(("json", text), content.strip(), document_class(text))
        self._field_ballots[branch] = FieldBallot(label, fields)
        return label

    async def select(self, branches: Sequence[int]) -> SelectedReply | None:
        """Return the reply nearest to the winning vote of tool calls or JSON among finished `branches`.

        If most call no tool and none of these has an answer that can be compared, it is the one whose words overlap
        most with the others, or None if replies are judged. None also if no branch has such a vote; a vote on texts is
        the controller's.
        """
        fields = [index for index in branches if index in self._field_ballots]
        calls = [index for index in branches if index in self._tool_ballots]
        if calls:
            ballots = [self._tool_ballots[index] for index in calls]
            size = sum(len(ballot.calls.fields) for ballot in ballots if ballot.calls is not None)
            selected = calls[await _run(size * CHARS_PER_FIELD, lambda: select_by_calls(ballots))]
            if self._tool_ballots[selected] == ToolBallot(None):
                return None if self._is_judged else await self._most_similar(calls)
            if selected not in self._field_ballots:
                return SelectedReply(selected, by=SelectedBy.VOTE)
        if not fields:
            return None
        documents = [self._field_ballots[index] for index in fields]

        def choose() -> SelectedReply:
            vote = vote_on_fields([document.fields for document in documents])
            shown = dict(islice(vote.agreement.items(), MAX_SHOWN_FIELDS))
            return SelectedReply(fields[vote.select(documents)], shown, SelectedBy.VOTE)

        return await _run(sum(len(each.fields) for each in documents) * CHARS_PER_FIELD, choose)

    async def _most_similar(self, branches: Sequence[int]) -> SelectedReply:
        """Return the reply that shares most words with the others, among those that call no tool."""
        texts = {index: self._texts[index] for index in branches if self._tool_ballots[index] == ToolBallot(None)}
        return SelectedReply(await select_by_overlap(texts), by=SelectedBy.OVERLAP if len(texts) > 1 else None)


async def select_by_overlap(texts: Mapping[int, str]) -> int:
    """Return the branch whose text shares most words with the others; of equals, the first."""
    branches = sorted(texts)
    size = len(texts) * sum(map(len, texts.values()))
    return branches[await _run(size, lambda: medoid([texts[index] for index in branches]))]


async def _run(size: int, read: Callable[[], T]) -> T:
    """Return the result of `read`, which takes time in proportion to `size`. Large ones are read in a thread."""
    return read() if size <= MAX_READ_AT_ONCE else await asyncio.to_thread(read)


def _shortened(text: str) -> str:
    if len(text) <= MAX_WRITTEN:
        return text
    return f"{text[:MAX_WRITTEN]}… #{blake2b(text.encode(errors='replace'), digest_size=4).hexdigest()}"
