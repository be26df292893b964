"""Check with one branch whether a task can be voted on, before more than two branches are opened.

The first interval of that branch is generated ahead and probed. The probe's answer counts if there is another sign of
an answer (`votability.py`). Otherwise the branch runs alone to its end. If it has no answer then, the episode ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from discovery.answers import Answer
from proxy.environment import votability
from proxy.environment.branch_answers import BranchAnswers
from proxy.environment.branch_generator import BranchGenerator
from proxy.environment.votability import VotabilityState
from proxy.types import LiveBranch

UNCHECKED_BRANCHES: Final = 2
"""Number of branches that may be opened before it is known whether the task can be voted on."""

MOST_UNREADABLE: Final = 2
"""Maximum finished branches without a readable answer that a probe's answer outweighs.

Small models write some replies in a form in which no answer can be read.
"""


class BranchesTruncated(Exception):
    """The client's token limit cut the branches before they answered, and would cut further branches too."""


class NotVotable(Exception):
    """Finished branches have no answer, so the task cannot be voted on."""


class VotabilityCheck:
    """Votability check of one request. With `ends_early` false it never ends an episode."""

    def __init__(
        self, generator: BranchGenerator, answers: BranchAnswers, state: VotabilityState, *, ends_early: bool
    ) -> None:
        self._generator = generator
        self._answers = answers
        self._state = state
        self._ends_early = ends_early
        self._prompt = generator.prompt
        self._limits = generator.limits
        self._unopened: LiveBranch | None = None  # generated ahead, but not opened by the controller yet

    def accept(self) -> None:
        """Treat the task as votable, and never end the episode early."""
        self._state.votable = self._state.confirmed = True
        self._ends_early = False

    def take_unopened(self) -> LiveBranch | None:
        """Return and clear the branch that was generated ahead but not opened yet, or None."""
        branch, self._unopened = self._unopened, None
        return branch

    async def before_opening(self, branches: Sequence[LiveBranch], opening: int) -> None:
        """Check votability if `opening` more branches would exceed UNCHECKED_BRANCHES.

        Output that the check generates ahead is added to the branch when the controller advances it. Raises NotVotable
        or BranchesTruncated.
        """
        state = self._state
        if opening and self._ends_early:
            await self._check_limit(branches)
        if state.votable or not opening or len(branches) + opening <= UNCHECKED_BRANCHES:
            return
        running = [branch for branch in branches if branch.finish is None]
        if branches and not running:
            return  # all were cut by the limit, so no branch can be checked
        if running:
            checked = max(running, key=lambda branch: len(branch.ids))
        elif self._unopened is not None:
            checked = self._unopened
        else:
            checked = self._unopened = LiveBranch()
            await self._run_ahead(checked, branches)
        if not state.votable and not self._has_ended(checked) and self._prompt.kind.is_probeable:
            state.votable = state.probe_answered = await self._probe_shows_votable(checked)
        while not state.votable and not self._has_ended(checked):
            await self._run_ahead(checked, branches)
        if not state.votable and self._ends_early and self._is_truncated(checked):
            raise BranchesTruncated
        state.votable = True

    async def check_finished(self, text: str, cut_ids: Sequence[int] | None = None) -> Answer | None:
        """Check the `text` of a branch that has just finished. Return its answer if it was read.

        If a stop string cut the branch, `cut_ids` are its ids. Such a branch is probed if its text has no answer.
        Raises NotVotable.
        """
        if self._state.confirmed and cut_ids is None:
            return None
        answer = await self._answers.read(text)
        if answer is None and cut_ids is not None and self._prompt.kind.is_probeable and self._answers.may_probe_cut():
            answer = await self._answers.probe(cut_ids, text)
        self._note(answer, text)
        return answer

    async def check_cut(self, branches: Sequence[LiveBranch]) -> None:
        """Check the branches that a stop string has finished. Raises NotVotable."""
        for branch in branches:
            if branch.ended_by_stop_string and not branch.is_read and not self._state.confirmed:
                self._note(await self._answers.of_finished(branch), branch.text)

    def _note(self, answer: Answer | None, text: str) -> None:
        """Update the state for a finished branch. Raises NotVotable if the task cannot be voted on.

        If a probe has given an answer, up to MOST_UNREADABLE finished branches without an answer are tolerated.
        """
        state = self._state
        if answer is not None:
            state.votable = state.confirmed = True
            return
        if state.confirmed or not self._prompt.template.split(self._prompt.tail, text)[1].strip():
            return
        state.unreadable += 1
        if state.unreadable > (MOST_UNREADABLE if state.probe_answered else 0):
            raise NotVotable

    async def _check_limit(self, branches: Sequence[LiveBranch]) -> None:
        """Raise BranchesTruncated if the client's token limit cuts branches before they answer.

        If the limit is at most one interval, the first branch is generated ahead alone to find out.
        """
        if not branches and self._unopened is None and self._limits.branch <= self._limits.interval:
            self._unopened = LiveBranch()
            await self._run_ahead(self._unopened, branches)
            if self._is_truncated(self._unopened):
                raise BranchesTruncated
        if branches and all(branch.finish == "length" for branch in branches) and not self._state.controller_probed:
            raise BranchesTruncated

    def _is_truncated(self, branch: LiveBranch) -> bool:
        """Return whether `branch` has reached the token limit before its end."""
        last = branch.ahead[-1].finish if branch.ahead else branch.finish
        return last != "stop" and len(_with_ahead(branch)[0]) >= self._limits.branch

    async def _run_ahead(self, branch: LiveBranch, branches: Sequence[LiveBranch]) -> None:
        """Generate one more interval of `branch` ahead. Raises NotVotable if it ends without an answer."""
        ids, known = _with_ahead(branch)
        max_tokens = min(self._limits.interval, self._limits.branch - len(ids))
        piece = branch.pieces + len(branch.ahead)
        index = next((i for i, other in enumerate(branches) if other is branch), len(branches))
        sampling = self._generator.sampling(known, index, piece)
        output = await self._generator.generate_one([*self._prompt.ids, *ids], max_tokens, sampling, branch)
        branch.ahead.append(output)
        ids, text = _with_ahead(branch)
        cut = self._generator.stops.cut(text, len(known))
        if cut is not None:
            output.finish, output.ended_by_token = "stop", False
        if output.finish == "stop":
            is_cut = cut is not None or not output.ended_by_token
            answer = await self.check_finished(text[:cut], ids if is_cut else None)
            branch.answer, branch.is_read = answer, branch.is_read or is_cut

    async def _probe_shows_votable(self, branch: LiveBranch) -> bool:
        """Probe `branch`. Return whether it gives an answer and there is another sign that the task has one."""
        ids, text = _with_ahead(branch)
        return votability.is_votable(self._prompt.asks_for_answer, text, await self._answers.probe(ids, text))

    def _has_ended(self, branch: LiveBranch) -> bool:
        """Return whether `branch` has finished or reached a limit, so that it cannot be generated further ahead."""
        ahead = sum(len(output.ids) for output in branch.ahead)
        if branch.ahead and branch.ahead[-1].finish == "stop":
            return True
        if self._limits.ahead is not None and ahead + self._limits.interval > self._limits.ahead:
            return True
        return len(branch.ids) + ahead >= self._limits.branch


def _with_ahead(branch: LiveBranch) -> tuple[list[int], str]:
    """Return the ids and the text of `branch`, including what was generated ahead."""
    ids = [*branch.ids, *(i for output in branch.ahead for i in output.ids)]
    return ids, branch.text + "".join(output.text for output in branch.ahead)
