"""The file that branches are collected into, and a second file with the tokens of failed requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from discovery.data.collection_plan import BranchKey, CollectionPlan
from discovery.data.importers import parse_recording_line
from discovery.data.questions import Question
from discovery.data.recordings import RecordedBranch, RecordedQuestion, Version, default_split
from discovery.data.safe_json import parse_json
from discovery.data.shared_jsonl import SharedLines
from discovery.errors import BadRecording, CollectError


class CollectionFile:
    """The branches of a plan that a file holds, as far as it has been read.

    The tokens of failed requests are in a second file, whose name ends in `.lost`.
    """

    def __init__(self, lines: SharedLines, plan: CollectionPlan, questions: Mapping[str, Question]) -> None:
        self.path = lines.path
        self.done: set[BranchKey] = set()
        self.spent = 0  # tokens of the plan's branches, probes included, and of its lost requests
        self.version: Version | None = None  # of all branches; None before the first
        self._lines = lines
        self._lost = SharedLines(lines.path.with_name(f"{lines.path.name}.lost"), may_be_link=False)
        self._plan = plan
        self._questions = questions

    def repair(self) -> None:
        """Cut off lines that killed processes left incomplete."""
        self._lines.repair()
        self._lost.repair()

    def add(self, lines: Sequence[str]) -> None:
        """Append the lines of branches, their ends included. They are on disk together when this returns."""
        self._lines.append("".join(lines))

    def add_lost_tokens(self, tokens: int) -> None:
        """Record tokens that were spent on a failed request."""
        if tokens:
            self._lost.append(json.dumps({"of": self._plan.identity, "tokens": tokens}) + "\n")

    def read(self) -> list[BranchKey]:
        """Read the lines that are new and return the plan's branches among them.

        Raises CollectError if a branch does not match the plan's others, and BadRecording for an invalid line.
        """
        for number, text in self._lost.read_new():
            try:
                lost = parse_json(text)
                self.spent += lost["tokens"] if lost["of"] == self._plan.identity else 0
            except (ValueError, TypeError, KeyError):
                raise BadRecording(f"{self._lost.path}:{number}: not a record of lost tokens") from None
        new: list[BranchKey] = []
        for number, text in self._lines.read_new():
            where = f"{self.path}:{number}"
            try:
                line = parse_recording_line(text)
            except BadRecording as error:
                raise BadRecording(f"{where}: {error}") from None
            if line.part is None:
                raise CollectError(f"{where} was not collected (it has no part); name another file")
            if self._plan.includes(line):
                recorded = line.recorded()
                self.check_version(recorded.version, where)
                self._check_question(recorded, where)
                key = recorded.question, line.part
                if key not in self.done:
                    self.done.add(key)
                    new.append(key)
                self.spent += branch_cost(recorded.branches[0])
        return new

    def check_version(self, version: Version, where: str) -> None:
        """Raise CollectError if a branch's version differs from that of the file's branches."""
        if self.version is None:
            self.version = version
        changes = [
            f"{name.replace('_', ' ')} was {known!r} and is now {now!r}"
            for name, known, now in zip(Version._fields, self.version, version, strict=True)
            if known != now
        ]
        if changes:
            raise CollectError(
                f"{where} differs from what is in {self.path}: {', '.join(changes)}; "
                "the two are not comparable: collect into another file"
            )

    def _check_question(self, recorded: RecordedQuestion, where: str) -> None:
        """Raise CollectError if a question's reference or split has changed since a branch of it was recorded."""
        current = self._questions.get(recorded.question)
        if current is None:
            return
        split = current.split or default_split(current.question)
        for name, known, now in (
            ("reference", recorded.reference, current.recorded_reference),
            ("split", recorded.split.value, split.value),
        ):
            if known != now:
                raise CollectError(
                    f"question {current.id}: its {name} is now {now!r}, but {known!r} in {where}; "
                    "set it back, correct all its lines there, or collect into another file"
                )


def branch_cost(branch: RecordedBranch) -> int:
    """Return the tokens a branch took, probes included."""
    return branch.tokens + sum(branch.probe_tokens)
