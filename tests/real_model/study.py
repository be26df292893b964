"""Measure the gain and cost of β on the real model with intervals, and how well prose and tasks are distinguished."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.evaluation.paired_statistics import bootstrap_bounds, wilson_interval
from tests.proxy.environment.test_votability import PROSE, TASKS
from tests.real_model.asking import Message, RealModel, Reply, Sum, draw_sums

TAIL: Final = 2.5
"""Percent beyond each end of an interval."""
LIMIT: Final = 200
"""Most tokens of a reply to a sum."""
PROSE_LIMIT: Final = 300
"""Most tokens of a reply to prose or to a task without worked examples."""
UNVOTED: Final = 2
"""Branches that may be opened before it is known that a task can be voted on."""
GREEDY, SAMPLE = "greedy, without β", "single sample, without β"


def accuracy_cell(right: NDArray[np.float64]) -> str:
    """Return the percentage of right replies with its interval. `right` is 1 where a reply is right."""
    share = float(right.mean())
    low, high = wilson_interval(share, right.size)
    return f"{100 * share:.1f} ({low:.1f} to {high:.1f})"


def gain_cell(right: NDArray[np.float64], greedy: NDArray[np.float64]) -> str:
    """Return the points gained over greedy decoding on the same questions, with their interval."""
    low, high = bootstrap_bounds(right - greedy, TAIL)
    return f"{100 * float(right.mean() - greedy.mean()):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def mean_cell(values: Sequence[float], decimals: int) -> str:
    """Return the mean over questions with its interval; an empty cell if there are no values."""
    if not values:
        return ""
    low, high = bootstrap_bounds(np.array(values, float), TAIL)
    mean, low_text, high_text = (f"{value:,.{decimals}f}" for value in (statistics.fmean(values), low, high))
    return f"{mean} ({low_text} to {high_text})"


class Measured(NamedTuple):
    """One row: all sums asked one way."""

    name: str
    right: NDArray[np.float64]  # (questions,) 1 where the reply is right
    replies: Sequence[Reply]
    generated: int  # tokens by vLLM's own counter
    unseen: int  # upper bound of unbilled tokens, from the proxy's metric

    @property
    def billed(self) -> int:
        """Completion tokens billed over all requests."""
        return sum(reply.generated for reply in self.replies)

    @property
    def is_within_bound(self) -> bool:
        """Whether the generated tokens exceed the billed ones by no more than the metric allows."""
        return self.billed <= self.generated <= self.billed + self.unseen

    @property
    def not_votable(self) -> int:
        """Number of requests that ended as not votable."""
        return sum(reply.stop == "not_votable" for reply in self.replies)

    def cells(self, greedy: Measured) -> tuple[str, ...]:
        """Return the row as it is printed, compared with `greedy` on the same sums."""
        return (
            self.name,
            accuracy_cell(self.right),
            "" if self is greedy else gain_cell(self.right, greedy.right),
            f"{statistics.fmean(reply.total for reply in self.replies):,.1f}",
            f"{statistics.fmean(reply.branches for reply in self.replies):.1f}",
            f"{self.billed:,}",
            f"{self.generated:,}",
            f"{self.generated - self.billed:,} of {self.unseen:,}",
            str(self.not_votable),
        )


HEADINGS: Final = (
    *("", "accuracy %, 95 %", "over greedy", "tokens", "branches", "billed", "generated"),
    *("unbilled, of at most", "not votable"),
)


async def measure(
    model: RealModel, name: str, sums: Sequence[Sum], turns: Sequence[Message], beta: float | None, **fields: Any
) -> Measured:
    """Ask every sum one way."""
    conversations = [[*turns, {"role": "user", "content": asked.question}] for asked in sums]
    generated, unseen = await model.generated(), await model.unseen()
    replies = await model.ask_all(conversations, beta, max_tokens=LIMIT, **fields)
    generated = await model.generated() - generated
    right = [float(reply.number == str(asked.answer)) for reply, asked in zip(replies, sums, strict=True)]
    return Measured(name, np.array(right), replies, generated, await model.unseen() - unseen)


async def rows(
    model: RealModel, count: int, betas: Sequence[float], controllers: Sequence[str]
) -> AsyncIterator[Measured]:
    """Yield greedy first, then a single sample, then each controller at each β, at temperature 0 and at the default."""
    turns, sums = draw_sums(count)
    yield await measure(model, GREEDY, sums, turns, None, temperature=0)
    yield await measure(model, SAMPLE, sums, turns, None)
    for controller in controllers:
        for beta in betas:
            for name, sampling in (("temperature 0", {"temperature": 0}), ("default temperature", {})):
                tts = {"controller": controller}
                title = f"{controller}, β = {beta:g}, {name}"
                yield await measure(model, title, sums, turns, beta, tts=tts, **sampling)


class Sorted(NamedTuple):
    """Replies to prose and tasks, with error rates of the votability check and its cost."""

    prose: Sequence[Reply]
    tasks: Sequence[Reply]

    @property
    def voted_prose(self) -> int:
        """Number of prose prompts for which a third branch was opened."""
        return sum(reply.branches > UNVOTED for reply in self.prose)

    @property
    def missed_tasks(self) -> int:
        """Number of tasks that ended as prose before a third branch was opened."""
        return sum(reply.stop == "not_votable" and reply.branches <= UNVOTED for reply in self.tasks)

    @property
    def unreadable_tasks(self) -> int:
        """Number of tasks that were voted on and ended because two replies had no readable answer."""
        return sum(reply.stop == "not_votable" and reply.branches > UNVOTED for reply in self.tasks)

    def lines(self) -> Iterator[str]:
        """Yield both error rates with their intervals, and the cost of prose."""
        for wrong, replies, what in (
            (self.voted_prose, self.prose, "prose prompts voted on"),
            (self.missed_tasks, self.tasks, "tasks taken for prose"),
            (self.unreadable_tasks, self.tasks, "tasks voted on, and ended by two replies without a readable answer"),
        ):
            low, high = wilson_interval(wrong / len(replies), len(replies))
            yield f"{what}: {wrong} of {len(replies)} ({low:.0f} to {high:.0f} %)"
        spent = [reply.total for reply in self.prose]
        yield f"tokens of a prose request: {statistics.fmean(spent):.0f} in the mean, {max(spent)} at most"
        for (question, *_), reply in zip((*PROSE, *TASKS), (*self.prose, *self.tasks), strict=True):
            cost = f"{reply.stop:>14} {reply.branches:>3} branches {reply.total:>6} tokens"
            yield f"  {cost}  {question!r} → {reply.text[-60:]!r}"


async def tell_apart(model: RealModel, beta: float, controller: str) -> Sorted:
    """Ask the prose and the tasks of the votability test without worked examples."""
    conversations = [[{"role": "user", "content": question}] for question, *_ in (*PROSE, *TASKS)]
    replies = await model.ask_all(conversations, beta, max_tokens=PROSE_LIMIT, tts={"controller": controller})
    return Sorted(replies[: len(PROSE)], replies[len(PROSE) :])
