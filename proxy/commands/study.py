"""Measure the embedded model on its held-back problems, through a running server. This is not an `autotts` command.

    python -m deploy.embedded.server --port 8001 &
    python -m proxy.commands.study --url http://127.0.0.1:8001

Prints the accuracy of a greedy answer, of one sample, and of the majority of k samples (self-consistency, SC@k). Also
prints the accuracy of probes in a thought that is cut early, and the lengths of thoughts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
from rich.console import Console
from rich.table import Table

from deploy.embedded import task
from discovery.answers import boxed
from proxy import probe_templates
from proxy.types import Call, Output
from proxy.upstream.client import UpstreamClient

TEMPLATE = probe_templates.TEMPLATES[probe_templates.Family.QWEN3]

VOTERS = (1, 2, 4, 8, 16, 32)
DEPTHS = tuple(tenth / 10 for tenth in range(11))
BANDS = ((4, 7), (8, 11), (12, 16))
MAX_TOKENS = 700
SUBSETS = 200


@dataclass(frozen=True, slots=True)
class SampledReply:
    """Answer and number of tokens of one completion."""

    answer: str | None
    tokens: int


@dataclass(frozen=True, slots=True)
class StudiedProblem:
    """The replies of the model to one problem. `probes` has one row per probed reply, with one answer per depth."""

    problem: task.Problem
    greedy: SampledReply
    samples: list[SampledReply]
    probes: list[list[str]]

    def greedy_score(self) -> float:
        return float(self.greedy.answer == self.problem.answer)

    def vote_score(self, k: int) -> float:
        """Return the probability that a majority of k samples is right. Ties are broken evenly."""
        answers = [branch.answer for branch in self.samples]
        rng = random.Random(self.problem.question)
        return statistics.fmean(majority(rng.sample(answers, k), self.problem.answer) for _ in range(SUBSETS))

    def agreement(self) -> float:
        """Return the share of samples that give the most common answer."""
        return Counter(branch.answer for branch in self.samples).most_common(1)[0][1] / len(self.samples)


def majority(answers: Sequence[str | None], truth: str) -> float:
    """Return 1 if the truth has the most votes, 0 if not, and 1/n if n answers with the truth among them tie."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    leaders = [answer for answer, count in votes.items() if count == most]
    return float(truth in leaders) / max(1, len(leaders))


class Study:
    """Sends the problems to a server, a few at a time."""

    def __init__(self, engine: UpstreamClient, model: str, samples: int, probed: int, at_once: int) -> None:
        self._engine = engine
        self._model = model
        self._samples = samples
        self._probed = probed
        self._slots = asyncio.Semaphore(at_once)

    async def run(self, problems: Sequence[task.Problem]) -> list[StudiedProblem]:
        suffix = await self._engine.tokenise_suffix(self._model, TEMPLATE.longest_suffix)
        end = (await self._engine.tokenise_suffix(self._model, TEMPLATE.ending))[0]
        return list(await asyncio.gather(*(self._outcome(problem, suffix, end) for problem in problems)))

    async def _outcome(self, problem: task.Problem, suffix: list[int], end: int) -> StudiedProblem:
        async with self._slots:
            messages = [{"role": "user", "content": problem.question}]
            prompt = await self._engine.tokenise_chat({"model": self._model, "messages": messages})
            [greedy] = await self._complete(prompt, MAX_TOKENS, temperature=0)
            seed = random.Random(problem.question).getrandbits(31)
            outputs = await self._complete(prompt, MAX_TOKENS, n=self._samples, temperature=1, seed=seed)
            thoughts = [_thought(output.ids, end) for output in outputs[: self._probed]]
            probes = [await self._probe(prompt, thought, suffix) for thought in thoughts]
            return StudiedProblem(problem, _branch(greedy), [_branch(output) for output in outputs], probes)

    async def _probe(self, prompt: list[int], thought: list[int], suffix: list[int]) -> list[str]:
        """Return the answers of probes at each of DEPTHS. The last depth is the end of the thought."""
        cuts = [thought[: max(1, round(depth * len(thought)))] for depth in DEPTHS]
        probes = (self._complete(prompt + cut + suffix, 8, temperature=0, stop=["}"]) for cut in cuts)
        return [output.text for [output] in await asyncio.gather(*probes)]

    async def _complete(self, prompt: list[int], max_tokens: int, n: int = 1, **sampling: object) -> list[Output]:
        call = Call([prompt], max_tokens, sampling, n=n)
        await self._engine.generate(self._model, call)
        return call.outputs


def _thought(ids: list[int], end: int) -> list[int]:
    """Return the ids of the thought without its closing tag and the line break before it: the probe appends both."""
    return ids[: ids.index(end) - 1] if end in ids else ids


def _branch(output: Output) -> SampledReply:
    return SampledReply(boxed(output.text), len(output.ids))


def report(outcomes: Sequence[StudiedProblem], console: Console) -> None:
    """Print the tables."""
    console.print(_accuracies(outcomes))
    console.print(_probe_accuracies(outcomes))
    console.print(_lengths(outcomes))


def _accuracies(outcomes: Sequence[StudiedProblem]) -> Table:
    bands = [[o for o in outcomes if low <= o.problem.length <= high] for low, high in BANDS]
    columns = ("", "all", *(f"{low}-{high} steps" for low, high in BANDS))
    table = Table(*columns, title="Accuracy, % (± one standard error)")
    table.add_row("problems", *(str(len(group)) for group in (outcomes, *bands)))
    scores: dict[str, Callable[[StudiedProblem], float]] = {"greedy": StudiedProblem.greedy_score}
    for k in VOTERS:
        if k <= len(outcomes[0].samples):
            scores[f"SC@{k}"] = lambda outcome, k=k: outcome.vote_score(k)  # type: ignore[misc]
    scores[f"SC@{k} - greedy"] = lambda outcome: outcome.vote_score(k) - outcome.greedy_score()
    scores["agreement of samples"] = StudiedProblem.agreement
    for name, score in scores.items():
        table.add_row(name, *(_mean([score(outcome) for outcome in group]) for group in (outcomes, *bands)))
    return table


def _probe_accuracies(outcomes: Sequence[StudiedProblem]) -> Table:
    table = Table("share of the thought", *(f"{depth:.0%}" for depth in DEPTHS), title="Accuracy of a probe, %")
    for name, against in (("right", _is_true), ("equal to the branch's final answer", _is_kept)):
        branches = [(outcome, branch) for outcome in outcomes for branch in range(len(outcome.probes))]
        row = (statistics.fmean(against(*branch, depth) for branch in branches) for depth in range(len(DEPTHS)))
        table.add_row(name, *(f"{100 * value:.0f}" for value in row))
    return table


def _is_true(outcome: StudiedProblem, branch: int, depth: int) -> float:
    return float(outcome.probes[branch][depth] == outcome.problem.answer)


def _is_kept(outcome: StudiedProblem, branch: int, depth: int) -> float:
    return float(outcome.probes[branch][depth] == outcome.samples[branch].answer)


def _lengths(outcomes: Sequence[StudiedProblem]) -> Table:
    tokens = [branch.tokens for outcome in outcomes for branch in outcome.samples]
    points = (0.05, 0.25, 0.5, 0.75, 0.95)
    columns = ("min", *(f"{point:.0%}" for point in points), "max", "mean", "no answer")
    table = Table(*columns, title="Tokens per branch")
    ordered = sorted(tokens)
    quantiles = (str(ordered[round(point * (len(ordered) - 1))]) for point in points)
    unanswered = statistics.fmean(branch.answer is None for outcome in outcomes for branch in outcome.samples)
    mean = f"{statistics.fmean(tokens):.0f}"
    table.add_row(str(ordered[0]), *quantiles, str(ordered[-1]), mean, f"{unanswered:.2%}")
    return table


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


async def _main(arguments: argparse.Namespace) -> None:
    problems = task.held_back(arguments.problems, arguments.seed)
    async with aiohttp.ClientSession() as session:
        engine = UpstreamClient(arguments.url, session)
        study = Study(engine, arguments.model, arguments.samples, arguments.probed, arguments.at_once)
        report(await study.run(problems), Console(width=arguments.width))


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m proxy.commands.study", description=summary)
    parser.add_argument("--url", default="http://127.0.0.1:8001")
    parser.add_argument("--model", default="autotts-tiny")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed that selects the held-back problems")
    parser.add_argument("--samples", type=int, default=48, help="branches per problem; at least 32 for SC@32")
    parser.add_argument("--probed", type=int, default=4, help="branches per problem that are probed at every depth")
    parser.add_argument("--at-once", type=int, default=3, help="problems in flight")
    parser.add_argument("--width", type=int, default=120, help="width of the tables in characters")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
