"""Reads the answers of one request's branches and probes, and numbers them as labels."""

from __future__ import annotations

from collections.abc import Sequence

from discovery.answers import Answer, Labels
from proxy import probe_templates
from proxy.environment.answer_reader import Grader
from proxy.environment.branch_generator import BranchGenerator
from proxy.types import LiveBranch, Output


async def number_answer(grader: Grader, labels: Labels, answer: Answer | None) -> int | None:
    """Return the label of an answer. If canonical forms do not decide it, the grader does."""
    if answer is None:
        return None
    undecided = labels.undecided(answer.form)
    equal = await grader.compare(answer.written, undecided) if undecided else None
    return labels.assign(answer.form, answer.written, equal)


class BranchAnswers:
    """Answers of one request's branches. A label is the number of an answer; equal answers share one."""

    def __init__(self, generator: BranchGenerator, grader: Grader) -> None:
        self.grader = grader
        self.labels = Labels()
        self.own_probe_tokens = 0  # tokens of probes that no controller asked for
        self.cut_probes = 0  # branches cut by a stop string that were probed for their answer
        self._generator = generator
        self._prompt = generator.prompt
        self._limits = generator.limits

    async def number(self, answer: Answer | None, labels: Labels | None = None) -> int | None:
        """Return the label of an answer among `labels`, by default those of the request.

        If canonical forms do not decide the label, the grader does.
        """
        return await number_answer(self.grader, self.labels if labels is None else labels, answer)

    async def read(self, text: str) -> Answer | None:
        """Return the answer in the reply part of a branch's text, if there is one."""
        return await self.grader.read(self._prompt.template.split(self._prompt.tail, text)[1], self._prompt.kind)

    async def of_finished(self, branch: LiveBranch) -> Answer | None:
        """Return the answer of a finished branch, or None. The branch is read only once.

        A branch that was cut within its thought has no answer. If a client's stop string cut the reply before its
        answer, the branch is probed.
        """
        if not branch.is_read and branch.finish == "stop":
            branch.answer, branch.is_read = await self.read(branch.text), True
            if (
                branch.answer is None
                and branch.ended_by_stop_string
                and self._prompt.kind.is_probeable
                and self.may_probe_cut()
            ):
                branch.answer = await self.probe(branch.ids, branch.text)
        return branch.answer

    def may_probe_cut(self) -> bool:
        """Count a reply that was cut by a stop string. Return whether it may be probed for its answer."""
        self.cut_probes += 1
        return self._limits.cut_probes is None or self.cut_probes <= self._limits.cut_probes

    async def of_probe(self, output: Output) -> Answer | None:
        """Return the answer in a probe's output, if there is one."""
        text = self._prompt.template.answered(output.text)
        return None if text is None else await self.grader.read(text, self._prompt.kind)

    async def probe(self, ids: Sequence[int], text: str) -> Answer | None:
        """Probe a branch with these ids and this text. The tokens count as the proxy's, not as a controller's."""
        suffix = await self._generator.suffix(text, lead=True)
        context = [*self._prompt.ids, *ids, *suffix]
        output = await self._generator.generate_one(
            context, self._limits.probe, probe_templates.sampling(), suffix=len(suffix)
        )
        self.own_probe_tokens += len(suffix) + len(output.ids)
        return await self.of_probe(output)
